"""The pipelines of one run. Imports no torch before it loads one."""

import functools
from pathlib import Path

from vqdm.config.codecs import PeerConfig
from vqdm.config.options import Config, ModelConfig
from vqdm.runs.heap import return_freed_memory
from vqdm.stages.graph.samplers import compares_with_teacher
from vqdm.stages.graph.student import teacher_model
from vqdm.stages.layout import DENOISER


class Models:
    """Pipelines of one run, each loaded when first needed, one at a time, so that a small GPU will do."""

    def __init__(self, config: Config, device: str, *, model: ModelConfig | None = None):
        """model: the one whose files are loaded, such as a few-step student; None: the configured one."""
        self.config, self.device, self.model = config, device, model or config.model
        self.part_directory: Path | None = None  # of the stage that quantizes text encoders and VAE, once it is there

    @functools.cached_property
    def teacher(self):
        from vqdm.models.loader import load_pipeline

        return_freed_memory()  # a student that was trained refers to itself: it would lie beside what is loaded now
        return load_pipeline(self.model, device=self.device)

    def originals(self):
        """The pipeline of the images to compare with: full precision, or a few-step student's teacher."""
        from vqdm.models.loader import load_pipeline

        if not compares_with_teacher(self.config):
            return self.teacher
        self.release()
        return load_pipeline(teacher_model(self.config), device=self.device)

    def release(self) -> None:
        """Free the memory of pipelines that no stage needs any more."""
        self.__dict__.pop("teacher", None)
        return_freed_memory()

    def _parts(self) -> dict:
        """The quantized text encoders and VAE, on the CPU; none where the model's own serve."""
        if self.part_directory is None:
            return {}
        import torch

        from vqdm.hub.parts import load_part

        dtype = getattr(torch, self.model.dtype)
        places = sorted(file.parent for file in self.part_directory.glob("*/config.json"))
        return {place.name: load_part(place, dtype=dtype) for place in places}

    def own(self):
        """A full-precision pipeline that may be changed."""
        from vqdm.models.loader import load_pipeline

        self.release()
        return load_pipeline(self.model, device=self.device)

    def pruned(self, directory: Path):
        """A full-precision pipeline without the operators that a stage took out."""
        from vqdm.acceleration.operators import remove
        from vqdm.models.loader import denoiser_of
        from vqdm.stages.prune import removed_in

        pipeline = self.own()
        remove(denoiser_of(pipeline), removed_in(directory))
        return pipeline

    def student(self, quantized: Path | None, *, decode: str = "cached", dtype=None):
        """The teacher itself, or a separate pipeline with the denoiser that a stage made; the teacher's is not read.

        dtype: that of the student's floats; None: the model's.
        """
        from vqdm.models.loader import load_pipeline

        if quantized is None:
            return self.teacher
        self.release()
        denoiser = self._denoiser(quantized, decode, dtype)
        return load_pipeline(self.model, device=self.device, denoiser=denoiser, **self._parts())

    def student_and_teacher(self, quantized: Path, *, decode: str = "cached", dtype=None):
        """A student's pipeline, and the full-precision denoiser it replaces; arguments as for `student`."""
        from vqdm.hub.pipelines import replace_denoiser
        from vqdm.models.loader import denoiser_of

        pipeline = self.own()
        teacher = denoiser_of(pipeline)
        replace_denoiser(pipeline, self._denoiser(quantized, decode, dtype).to(self.device))
        return pipeline, teacher

    def _denoiser(self, quantized: Path, decode: str, dtype):
        """The denoiser that a stage made, on the CPU."""
        import torch

        from vqdm.hub.pipelines import load_denoiser

        dtype = getattr(torch, self.model.dtype) if dtype is None else dtype
        if isinstance(self.config.quantize, PeerConfig):
            from vqdm.hub.peers import load_by_peer

            return load_by_peer(quantized / DENOISER, dtype=dtype, config=self.config.quantize)
        return load_denoiser(quantized / DENOISER, dtype=dtype, decode=decode)


def in_fp32() -> dict:
    """How a student is loaded to be trained. No decoded weights are kept: a small GPU lacks the room."""
    import torch

    return {"decode": "per_call", "dtype": torch.float32}
