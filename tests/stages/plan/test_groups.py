"""Groups of layers as the plan foresees them are those that the stage takes."""

from unets import small_unet

from vqdm.calibration.blocks import execution_order
from vqdm.calibration.pairs import same_inputs
from vqdm.config.codecs import GptqConfig, RtnConfig
from vqdm.models.specs import layer_specs
from vqdm.stages.plan.forward import denoiser_inputs, measure_denoiser
from vqdm.stages.plan.groups import groups_of, reads_both


def test_passes_of_both_denoisers_are_foreseen_one_for_every_tensor_that_is_read():
    unet = small_unet()
    specs = {spec.name: spec for spec in layer_specs(unet)}
    call = denoiser_inputs(unet, batch=2)
    order = [specs[name] for name in execution_order(unet, call, specs)]
    done = [[spec.name for spec in part] for part in same_inputs(unet, order, call)]
    inputs = measure_denoiser(small_unet().to("meta"), order).inputs
    found = groups_of(order, inputs, GptqConfig(hessian_from="both"), room=1 << 30)
    assert [[spec.name for spec in part] for part in found] == done
    assert max(map(len, done)) == 3 and len(done) > len(order) / 2


def test_a_codec_without_hessians_reads_nothing():
    assert reads_both(GptqConfig(hessian_from="both")) and not reads_both(RtnConfig(hessian_from="both"))
