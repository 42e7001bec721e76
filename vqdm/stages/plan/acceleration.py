"""Memory and time of the stages that take operators out, or look at a denoiser while it samples."""

import dataclasses

from vqdm.acceleration.operators import operators
from vqdm.stages.graph.samplers import image_sampler
from vqdm.stages.plan import memory
from vqdm.stages.plan.memory import Memory
from vqdm.stages.plan.stage import Experiment, StageCost
from vqdm.stages.prune import CALLS


class AccelerationPlan(Experiment):
    """Each stage is a method."""

    def scores(self) -> StageCost:
        """Cost of running the model once without each operator: on captions, or on a few recorded calls."""
        own, sampler, count = self.config.prune, self.config.model.sampler, len(operators(self.denoiser))
        used = self._memory()
        if own.score == "latents":
            samplings = (count + 1) * min(own.prompts, self.calibration_prompts)
            note = f"{count} operators, each with {own.prompts} captions of {sampler.steps} steps"
            return self.stage("scores", used, self.sampling(samplings, sampler), note)
        timed = self.forwards(count * CALLS * self.samples_per_call())
        return self.stage("scores", used, timed, f"{count} operators, each on {CALLS} recorded calls")

    def prune(self) -> StageCost:
        """Cost of the output's error on the recorded calls."""
        return self.stage("prune", self._memory(), self.forwards(self.recorded_samples()))

    def schedule(self) -> StageCost:
        """Cost of sampling the cache's captions, without decoding."""
        timed = self.sampling(self.config.cache.prompts, image_sampler(self.config))
        return self.stage("schedule", self._memory(), timed)

    def activations(self) -> StageCost:
        timed = self.sampling(self.config.activations.prompts, image_sampler(self.config))
        return self.stage("activations", self._memory(), timed)

    def correct(self) -> StageCost:
        return dataclasses.replace(self.schedule(), name="correct")

    def _memory(self) -> Memory:
        return memory.generate_memory(self.model, self.samples_per_call(), 0, device=self.machine.device)
