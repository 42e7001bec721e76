"""The inner loops of additive codes, compiled by numba: one thread, no global state, on every processor the same bits.

Arrays are fp32 and C-contiguous, codes int32 [rows, groups, M]; codebooks [M, K, g]. With H_j the g × g metric of group
j, images[j] = codebooks · H_j [groups, M, K, g] and norms[j] = c H_j cᵀ [groups, M, K'], words [M, g', K'] = codebooks
transposed, where g' and K' are g and K padded to multiples of 8: words by zeros, norms by infinity.

A group's cost, up to a constant, is (Σ c_m) H_j (Σ c_m)ᵀ − 2 v · Σ c_m: when its codewords are taken one after another,
each adds norm − 2 rest · word, where rest, at first v, then loses the word's image.
"""

import functools

import numpy as np

from vqdm.runs.compiling import njit

LANES = 8  # g and K are padded to multiples of it: products summed in registers, and candidates compared at once
# Without "reassoc" and "contract", which cost nothing here: sums then have one order, and so one result, on every CPU
compiled = functools.partial(njit, nogil=True, cache=True, fastmath={"nsz", "nnan"})


@compiled
def candidate_costs(base, rests, at, words, m, norms, j, costs, minima):
    """Write base + norms[j, m] − 2 rests[at] · words[m] into costs [K'], the least of every LANES into minima."""
    size = norms.shape[2]
    for d in range(0, words.shape[1], LANES):
        r0, r1, r2, r3 = rests[at, d], rests[at, d + 1], rests[at, d + 2], rests[at, d + 3]
        r4, r5, r6, r7 = rests[at, d + 4], rests[at, d + 5], rests[at, d + 6], rests[at, d + 7]
        w0, w1, w2, w3 = words[m, d], words[m, d + 1], words[m, d + 2], words[m, d + 3]
        w4, w5, w6, w7 = words[m, d + 4], words[m, d + 5], words[m, d + 6], words[m, d + 7]
        if d == 0:
            for k in range(size):
                low = r0 * w0[k] + r1 * w1[k] + r2 * w2[k] + r3 * w3[k]
                high = r4 * w4[k] + r5 * w5[k] + r6 * w6[k] + r7 * w7[k]
                costs[k] = base + norms[j, m, k] - np.float32(2) * (low + high)
        else:
            for k in range(size):
                low = r0 * w0[k] + r1 * w1[k] + r2 * w2[k] + r3 * w3[k]
                high = r4 * w4[k] + r5 * w5[k] + r6 * w6[k] + r7 * w7[k]
                costs[k] -= np.float32(2) * (low + high)
    width = minima.shape[0]
    for k in range(width):
        least = costs[k]
        for lane in range(1, LANES):
            least = min(least, costs[k + lane * width])
        minima[k] = least


@compiled
def keep_cheapest(costs, minima, parent, filled, width, found, parents, picked, m):
    """Merge one hypothesis' candidates into the rising list found[m], at most `width` long; returns its new length."""
    worst = found[m, width - 1] if filled == width else np.float32(np.inf)
    stripes = minima.shape[0]
    for stripe in range(stripes):
        if minima[stripe] >= worst:
            continue
        for k in range(stripe, LANES * stripes, stripes):
            cost = costs[k]
            if cost >= worst:
                continue
            place = min(filled, width - 1)
            filled = min(filled + 1, width)
            while place > 0 and found[m, place - 1] > cost:
                found[m, place] = found[m, place - 1]
                parents[m, place] = parents[m, place - 1]
                picked[m, place] = picked[m, place - 1]
                place -= 1
            found[m, place], parents[m, place], picked[m, place] = cost, parent, k
            if filled == width:
                worst = found[m, width - 1]
    return filled


@compiled
def search_groups(product, coupling, inverse, scales, codebooks, words, images, norms, codes, error, beam_size):
    """Choose the codes of least cost for each group of a block in turn, all else fixed; changes codes and error.

    product = error · coupling [rows, b], kept up to date for the groups to come; coupling [b, b]; inverse = 1 / scales
    [rows]; codes [rows, b / g, M]; error = weight − decoded [rows, b]. A beam over the codebooks finds new codes; the
    present ones stay unless these cost less, so that no cost ever rises.
    """
    rows, groups, count = codes.shape
    group_size = codebooks.shape[2]
    costs = np.empty(norms.shape[2], np.float32)
    minima = np.empty(norms.shape[2] // LANES, np.float32)
    rests = np.zeros((beam_size, words.shape[1]), np.float32)  # rest of every hypothesis, with m codewords
    parent_rests = np.zeros((beam_size, words.shape[1]), np.float32)
    found = np.empty((count, beam_size), np.float32)
    parents = np.empty((count, beam_size), np.int32)
    picked = np.empty((count, beam_size), np.int32)
    chosen = np.empty(count, np.int32)
    change = np.empty(group_size, np.float32)
    for j in range(groups):
        first = j * group_size
        for o in range(rows):
            # rest = v, the group's target times H_j in units of the scale: ((error + decoded) · coupling)_j / scale_o
            for d in range(group_size):
                rest = product[o, first + d] * inverse[o]
                for m in range(count):
                    rest += images[j, m, codes[o, j, m], d]
                rests[0, d] = change[d] = rest
            # cost of the present codes: Σ_m (norm_m − 2 rest · c_m), with rest ← rest − c_m H_j after each codeword
            present = np.float32(0)
            for m in range(count):
                k = codes[o, j, m]
                dot = np.float32(0)
                for d in range(group_size):
                    dot += change[d] * codebooks[m, k, d]
                    change[d] -= images[j, m, k, d]
                present += norms[j, m, k] - np.float32(2) * dot
            alive = 1
            for m in range(count):
                width = beam_size if m < count - 1 else 1
                filled = 0
                for b in range(alive):
                    base = found[m - 1, b] if m > 0 else np.float32(0)
                    candidate_costs(base, rests, b, words, m, norms, j, costs, minima)
                    filled = keep_cheapest(costs, minima, b, filled, width, found, parents, picked, m)
                alive = filled
                if m < count - 1:
                    parent_rests[:] = rests
                    for b in range(alive):
                        for d in range(group_size):
                            rests[b, d] = parent_rests[parents[m, b], d] - images[j, m, picked[m, b], d]
            if not found[count - 1, 0] < present:
                continue
            b = 0
            for m in range(count - 1, -1, -1):
                chosen[m] = picked[m, b]
                b = parents[m, b]
            for d in range(group_size):
                total = np.float32(0)
                for m in range(count):
                    total += codebooks[m, chosen[m], d] - codebooks[m, codes[o, j, m], d]
                change[d] = total * scales[o]
                error[o, first + d] -= change[d]
            for m in range(count):
                codes[o, j, m] = chosen[m]
            # product ← product − change · coupling, for the groups to come
            for d in range(group_size):
                for i in range(first + group_size, product.shape[1]):
                    product[o, i] -= change[d] * coupling[first + d, i]


@compiled
def subtract_product(source, change, b, coupling, first, target):
    """Write source [in] − change[b] · coupling[first : first + g] into target [in]."""
    group_size = change.shape[1]
    target[:] = source
    whole = group_size - group_size % 4
    for d in range(0, whole, 4):
        c0, c1, c2, c3 = change[b, d], change[b, d + 1], change[b, d + 2], change[b, d + 3]
        h0, h1, h2, h3 = coupling[first + d], coupling[first + d + 1], coupling[first + d + 2], coupling[first + d + 3]
        for i in range(target.shape[0]):
            target[i] -= c0 * h0[i] + c1 * h1[i] + c2 * h2[i] + c3 * h3[i]
    for d in range(whole, group_size):
        for i in range(target.shape[0]):
            target[i] -= change[b, d] * coupling[first + d, i]


@compiled
def search_rows(product, hessian, inverse, scales, codebooks, words, images, norms, codes, order, turns, beam_size):
    """Search whole rows with a beam of hypotheses, changing one codebook of one group at a time; changes codes.

    product = (weight − decoded) · hessian [rows, in]; order [groups] of the groups; turns [groups, M] of the codebooks
    in each. Every hypothesis carries its own product, which changes by g rows of the Hessian for each group.
    """
    rows, groups, count = codes.shape
    group_size = codebooks.shape[2]
    costs = np.empty(norms.shape[2], np.float32)
    minima = np.empty(norms.shape[2] // LANES, np.float32)
    products = np.empty((rows, beam_size, product.shape[1]), np.float32)
    old_products = np.empty((beam_size, product.shape[1]), np.float32)
    products[:, 0] = product
    alive = np.ones(rows, np.int32)
    losses = np.zeros((rows, beam_size), np.float32)  # change of the loss since the start, in units of scale²
    found = np.empty((1, beam_size), np.float32)
    parents = np.empty((1, beam_size), np.int32)
    picked = np.empty((1, beam_size), np.int32)
    rests = np.zeros((beam_size, words.shape[1]), np.float32)
    old_rests = np.zeros((beam_size, words.shape[1]), np.float32)
    origins = np.empty((groups, rows, beam_size), np.int32)  # the hypothesis before this group from which each one came
    old_origins = np.empty(beam_size, np.int32)
    taken = np.empty((groups, rows, beam_size, count), codes.dtype)
    old_taken = np.empty((beam_size, count), codes.dtype)
    change = np.empty((beam_size, group_size), np.float32)
    for t in range(groups):
        j = order[t]
        first = j * group_size
        for o in range(rows):
            for b in range(alive[o]):
                origins[t, o, b] = b
                taken[t, o, b] = codes[o, j]
                for d in range(group_size):
                    rests[b, d] = products[o, b, first + d] * inverse[o]
            for turn in range(count):
                m = turns[t, turn]
                present = codes[o, j, m]
                filled = 0
                # replacing codeword c by c′ changes the loss by −(norm_c − 2 rest · c) + (norm_c′ − 2 rest · c′),
                # with rest = (W − Q) H / scale + c H_j, from which c has been taken out
                for b in range(alive[o]):
                    dot = np.float32(0)
                    for d in range(group_size):
                        rests[b, d] += images[j, m, present, d]
                        dot += rests[b, d] * codebooks[m, present, d]
                    base = losses[o, b] - (norms[j, m, present] - np.float32(2) * dot)
                    candidate_costs(base, rests, b, words, m, norms, j, costs, minima)
                    filled = keep_cheapest(costs, minima, b, filled, beam_size, found, parents, picked, 0)
                old_rests[:] = rests
                old_origins[:] = origins[t, o]
                old_taken[:] = taken[t, o]
                alive[o] = filled
                for b in range(filled):
                    parent, k = parents[0, b], picked[0, b]
                    losses[o, b] = found[0, b]
                    origins[t, o, b] = old_origins[parent]
                    taken[t, o, b] = old_taken[parent]
                    taken[t, o, b, m] = k
                    for d in range(group_size):
                        rests[b, d] = old_rests[parent, d] - images[j, m, k, d]
            old_products[:] = products[o]
            for b in range(alive[o]):
                for d in range(group_size):
                    total = np.float32(0)
                    for m in range(count):
                        total += codebooks[m, taken[t, o, b, m], d] - codebooks[m, codes[o, j, m], d]
                    change[b, d] = total * scales[o]
                subtract_product(old_products[origins[t, o, b]], change, b, hessian, first, products[o, b])
    for o in range(rows):
        b = 0
        for t in range(groups - 1, -1, -1):
            codes[o, order[t]] = taken[t, o, b]
            b = origins[t, o, b]


@compiled
def scatter(gradient, codes, sums):
    """Add every group of gradient [rows, groups · g] to the sums [M, K, g] of its codewords."""
    rows, groups, count = codes.shape
    size = sums.shape[2]
    for o in range(rows):
        for j in range(groups):
            for m in range(count):
                k = codes[o, j, m]
                for d in range(size):
                    sums[m, k, d] += gradient[o, j * size + d]


@compiled
def gather(codebooks, codes, decoded):
    """Write Σ_m codebook_m[code_m] into decoded [rows, groups · g]: the transpose of `scatter`."""
    rows, groups, count = codes.shape
    size = codebooks.shape[2]
    for o in range(rows):
        for j in range(groups):
            for d in range(size):
                decoded[o, j * size + d] = codebooks[0, codes[o, j, 0], d]
            for m in range(1, count):
                for d in range(size):
                    decoded[o, j * size + d] += codebooks[m, codes[o, j, m], d]


@compiled
def codeword_metrics(metrics, codes, powers, sums):
    """Add power_o · H_j to the sum of every codeword in group j of row o.

    metrics [groups, g²], powers [rows], sums [M, K, g²].
    """
    rows, groups, count = codes.shape
    for o in range(rows):
        for j in range(groups):
            for m in range(count):
                k = codes[o, j, m]
                for d in range(sums.shape[2]):
                    sums[m, k, d] += powers[o] * metrics[j, d]
