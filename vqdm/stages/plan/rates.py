"""Seconds of work that this machine has not recorded: FLOPs and written bytes over the rates of data sheets.

All seconds from this table are labelled as estimates.
"""

from dataclasses import dataclass

from vqdm.stages.plan.forward import ForwardCost

# SDXL's U-Net takes 30 · 2 · 6.76 TFLOP for an image of 30 steps, in bf16 on an A100 within 3.31 s
# (pytorch.org/blog/accelerating-generative-ai-3): 0.39 of the data sheet's 312 TFLOP/s
REACHED = 0.4
SCORING = 8.4e-8  # seconds per number of an image on one core: 17 s for 64 of 1024² (scripts/bench_paired.py)


@dataclass(frozen=True)
class Card:
    """A device's data sheet: dense FLOP/s in 16 bit with sums in fp32, FLOP/s in fp32, bytes/s and bytes of memory."""

    name: str
    half: float
    single: float
    bandwidth: float
    memory: float = 0


CARDS = {
    "a100": Card("A100 SXM 80 GB", 312e12, 19.5e12, 2.04e12, 80e9),
    "4090": Card("RTX 4090", 165e12, 82.6e12, 1.01e12, 24e9),
    "h100": Card("H100 SXM", 989e12, 67e12, 3.35e12, 80e9),
    "h200": Card("H200 SXM", 989e12, 67e12, 4.8e12, 141e9),
}
CORE = Card("Zen 4 core", 99e9, 99e9, 1e10)  # 3.1 GHz · 32 FLOP; one of many that share the memory
ASSUMED = CARDS["h100"]  # where a plan for a CPU says what a GPU would take


@dataclass(frozen=True)
class Rates:
    """FLOP/s and bytes/s that one device reaches in one precision."""

    flops: float
    writing: float
    origin: str

    def seconds(self, cost: ForwardCost) -> float:
        return cost.flops / self.flops + cost.written_bytes / self.writing


@dataclass(frozen=True)
class Machine:
    """The machine that a plan is for. device: cpu | cuda. card: None for a CPU, and for an unknown GPU."""

    device: str
    threads: int
    card: Card | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def rates(self, dtype: str, *, threads: int | None = None) -> Rates | None:
        """Rates in this dtype; None without a data sheet. threads: how many of a CPU's to use, if not all."""
        if not self.on_gpu:
            return cpu_rates(threads or self.threads)
        return None if self.card is None else card_rates(self.card, dtype)

    @property
    def label(self) -> str:
        rates = self.rates("float32")
        return self.device if rates is None else f"{self.device}, {rates.origin.removeprefix('estimate: ')}"

    @property
    def silence(self) -> str:
        """Reason why no time is given; empty if one is."""
        known = self.card is not None or not self.on_gpu
        return "" if known else f"no data sheet of this GPU is here: plan_for={'|'.join(CARDS)} takes another's"


def machine_of(device: str, *, threads: int, wanted: str | None = None) -> Machine:
    """The machine to plan for. wanted: its card; None: the GPU that is here, by its name."""
    if device == "cpu":
        return Machine("cpu", threads)
    if wanted is None:
        import torch

        name = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
        words = name.replace("-", " ").split()
        wanted = None if "mig" in words else next((key for key in CARDS if key in words), None)
    return Machine(device, threads, CARDS.get(wanted))


def card_rates(card: Card, dtype: str) -> Rates:
    """Rates of a card for products in this dtype, by torch's name."""
    flops = card.single if dtype == "float32" else card.half
    return Rates(REACHED * flops, card.bandwidth, f"estimate: {REACHED:g} × {card.name}'s data sheet")


def cpu_rates(threads: int) -> Rates:
    """Rates of so many cores together; 16-bit floats are no faster there."""
    origin = f"estimate: {REACHED:g} × {threads} {CORE.name}{'s' if threads > 1 else ''}"
    return Rates(threads * REACHED * CORE.single, threads * CORE.bandwidth, origin)
