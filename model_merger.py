"""Merge, load and look at the result with one object, for notebooks.

    config = MergeConfig(
        strategy="weighted",
        models=[{"path": "chat", "weight": 0.6}, {"path": "code", "weight": 0.4}],
        output_path="merged",
        validation={"run_tests": True, "test_prompts": ["The capital of France is"]},
    )
    merger = ModelMerger(config)
    model = merger.merge()

A config is translated to a recipe (`merger_config`); merging is what every other command does.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval_compare import ROLES, Candidate, Comparison, Role, Settings, compare
from merge_adapter_output import AdapterReport
from merge_adapters import check_adapters, merge_adapters
from merge_load import check_to_run, load_to_run, merged_tokenizer, tokenizer_of
from merge_progress import teller
from merge_recipe import Recipe
from merge_report import MergeReport, PlanReport
from merge_run import merge_to_folder, merge_to_model, plan
from merger_config import MergeConfig, translate
from model_errors import ModelCompatibilityError, NoTokenizerError
from model_inference import (
    Running,
    chosen_device,
    loading_bars,
    release_memory,
    run_loaded,
)
from model_locate import last_part
from model_partial import PartialFolder
from model_text import numbered, say

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["MergeConfig", "ModelCompatibilityError", "ModelMerger", "check_model_compatibility"]

logger = logging.getLogger(__name__)


class ModelMerger:
    """Merges the models of a `MergeConfig`.

    Args:
        config: what to merge, and how. Its options, besides the parameters of the strategy:
            normalize_weights: divide by the sum of the weights ("weighted" does).
            weight_decay: merged values are multiplied by 1 minus this.
            scaling_factor: of the merged task vector (lambda).
            clamp_weights, clamp_range: bounds of merged values.
            interpolation_factor, normalize_before_slerp, epsilon: of SLERP; the first wins over
                the weights.
            merge_embeddings, merge_lm_head: False takes those of the base (the first model).
            torch_dtype: of the result: "float16", "bfloat16", "float32", or such a torch.dtype.
            device_map: "auto" merges on the CPU and loads the result on a GPU if there is one;
                "cpu"; "cuda" also merges there, and on the CPU if its memory does not suffice.
            max_memory, threads, resume, findings, verify_inputs: see `merge_run.RunSettings`.
            vocabulary, tokenizer_source, chat_template, include, exclude, profile,
            max_shard_size, lora_rounding, tied_lora, nan_policy: see `merge_recipe.Recipe`.
            merge_method, rank, max_rank, densities, lam, seed: of adapters; see
                `merge_adapters.AdapterMerge`.
            verbose: False shows no progress and no notes; log_level: of the logger `model_merger`.
            Others of known names are accepted, and a note says what happens instead.

    Attributes:
        config: as given.
        notes: what the user should know of how the config was understood, and of what was done.
        model, tokenizer: the last result, and its tokenizer; None before, or if it has none.
        report: what the last merge did; None for one in memory.
        validation: of the last result, if it was looked at.

    Raises:
        ValueError: something is wrong with the config; all of it is said at once.
    """

    def __init__(self, config: MergeConfig) -> None:
        self.config = config
        self._job = translate(config)
        if self._job.log_level is not None:
            logger.setLevel(self._job.log_level)
        self.notes = self._job.notes
        self.model: PreTrainedModel | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.report: MergeReport | AdapterReport | None = None
        self.validation: Comparison | None = None
        self._noted = False

    def merge(self) -> "PreTrainedModel":
        """Merge, and load the result.

        Returns:
            A transformers model; of adapters a PEFT model on their base.

        Raises:
            ValueError, ModelCompatibilityError, OSError: as `merge_run.merge_to_folder`.
        """
        if not self._noted:
            self._noted = True
            self._tell(*self.notes)
        self._check_others()
        logger.info("merging %d models by %s", len(self._job.sources), self.config.strategy)
        with loading_bars(show=self._job.run.progress is True):
            running = (
                self._merged() if isinstance(self._job.work, Recipe) else self._merged_adapter()
            )
            self.model, self.tokenizer = running.model, running.tokenizer  # whatever follows
            logger.info("the result runs in %s on %s", running.dtype, running.device)
            self._tell(*running.notes)
            if self._job.validation.wanted:
                self._look_at(running)
        return running.model

    def plan(self) -> PlanReport:
        """What a merge would do, from headers alone; of models only.

        The memory is that of merging; the result, which is loaded then, takes its size besides.

        Raises:
            ValueError, ModelCompatibilityError: as `merge`.
        """
        if not isinstance(self._job.work, Recipe):
            raise ValueError("a merge of adapters into one has no plan. Use check_compatibility()")
        self._tokenizer()  # which loads transformers, as a merge does, so that it is counted
        run = self._job.run
        return plan(
            self._job.work,
            device=run.device,
            threads=run.threads,
            max_memory=run.max_memory,
            findings=run.findings,
            resume=run.resume,
        )

    def check_compatibility(self) -> bool:
        """Whether all models fit together, from headers alone.

        Returns:
            True.

        Raises:
            ModelCompatibilityError: they do not; all that is wrong is said at once.
            ValueError: something is wrong with the output or a parameter.
        """
        if isinstance(self._job.work, Recipe):
            self._tell(*self.plan().notes)
        else:
            check_adapters(self._job.work)
        self._check_others()
        return True

    def load_models(self) -> "dict[str, PreTrainedModel]":
        """Load all models of the config, to look at them: a merge does not need it.

        Returns:
            Models by name, all in memory at once.
        """
        with loading_bars(show=self._job.run.progress is True):
            return {
                name: self._loaded(partial(load_to_run, path, needs_tokenizer=False)).model
                for name, path in self._job.sources.items()
            }

    def save_merged_model(
        self, merged_model: "PreTrainedModel", output_path: str | os.PathLike[str]
    ) -> None:
        """Save a result with its tokenizer, as transformers does, complete or not at all.

        Args:
            merged_model: a result of `merge`, maybe trained further.
            output_path: the folder to make; it must not exist, or be empty.

        Raises:
            OSError: it exists, or cannot be written.
        """
        tokenizer = self._tokenizer()
        with PartialFolder(Path(output_path), keep=False) as place:
            place.model.mkdir()
            merged_model.save_pretrained(place.model)
            if tokenizer is not None:
                tokenizer.save_pretrained(place.model)
            place.publish()

    def validate_merge(self, merged_model: "PreTrainedModel") -> Comparison:
        """Look at a result as `config.validation` says: beside its base and its sources.

        Args:
            merged_model: a result of `merge`.

        Returns:
            Numbers and answers; `summary()` is a text, `to_dict()` for JSON.
        """
        tokenizer = self._tokenizer(needed=True)
        device, dtype = str(merged_model.device), str(merged_model.dtype).removeprefix("torch.")
        was_training = merged_model.training
        try:
            with loading_bars(show=self._job.run.progress is True):
                running = Running(merged_model.eval(), tokenizer, device, dtype)
                self.validation = self._validated(running)
        finally:
            merged_model.train(was_training)
        return self.validation

    def _check_others(self) -> None:
        """What is needed after a merge, as far as that can be looked at before."""
        job = self._job
        names = [] if isinstance(job.work, Recipe) else [*job.sources.values()]  # on their base
        if job.base_model is not None and job.validation.wanted and not job.validation.quick:
            names.append(job.base_model)
        try:
            self._tell(*check_to_run(names))
        except ModelCompatibilityError as error:
            if any("is a model, not a LoRA adapter" in each for each in error.problems):
                error.add_note("peft_config is for adapters: leave it out to merge models")
            raise
        self._tokenizer(needed=job.validation.wanted)

    def _merged(self) -> Running:
        """The result of a recipe, where it is to run."""
        recipe, run = self._job.work, self._job.run
        assert isinstance(recipe, Recipe)
        if recipe.output_dir is None:
            model = self._on_device(
                lambda device: merge_to_model(
                    recipe,
                    device=device,
                    threads=run.threads,
                    max_memory=run.max_memory,
                    progress=run.progress,
                    verify_inputs=run.verify_inputs,
                )
            )
            return self._loaded(partial(run_loaded, model, self.tokenizer))
        self.report = self._on_device(
            lambda device: merge_to_folder(recipe, **{**vars(run), "device": device})
        )
        self._tell(*self.report.notes)
        output_dir = os.path.abspath(recipe.output_dir)
        return self._loaded(partial(load_to_run, output_dir, needs_tokenizer=False))

    def _merged_adapter(self) -> Running:
        """The merged adapter on its base: by PEFT, or folded where that is not installed."""
        job = self._job
        assert not isinstance(job.work, Recipe)
        assert job.output_dir is not None
        assert job.base_model is not None
        self.report = merge_adapters(
            job.work,
            job.output_dir,
            progress=job.run.progress,
            resume=job.run.resume,
            verify_inputs=job.run.verify_inputs,
        )
        self._tell(*self.report.notes)
        on_base = f"{job.base_model}+{job.output_dir}"
        try:
            from peft import PeftModel
        except ImportError:
            self._tell(
                "PEFT is not installed, so the adapter is folded into the model that follows"
            )
            return self._loaded(partial(load_to_run, on_base, needs_tokenizer=False))
        base = self._loaded(partial(load_to_run, job.base_model, needs_tokenizer=False))
        with warnings.catch_warnings():  # PEFT uses what transformers has renamed
            warnings.simplefilter("ignore", FutureWarning)
            model = PeftModel.from_pretrained(base.model, os.fspath(job.output_dir)).eval()
        return replace(base, model=model, tokenizer=self.tokenizer and tokenizer_of(on_base))

    def _on_device(self, merge: Callable[[str], Any]) -> Any:
        """Merge where the config says, and on the CPU if the memory of a GPU does not suffice."""
        device = self._job.run.device
        if device == "cpu":
            return merge(device)
        import torch

        try:
            return merge(device)
        except torch.cuda.OutOfMemoryError as error:
            self._tell(f"the memory of {device} does not suffice to merge ({error}); the CPU does")
        release_memory()
        return merge("cpu")

    def _loaded(self, load: Callable[[str, str], Running]) -> Running:
        """Load where the config says, and on the CPU if the memory of a GPU does not suffice."""
        import torch

        device, dtype = self._job.device, self._job.dtype
        try:
            return load(device, dtype)
        except torch.cuda.OutOfMemoryError as error:
            if chosen_device(device) == "cpu":
                raise
            self._tell(f"the memory of the GPU does not suffice ({error}); the CPU is used")
        release_memory()
        return load("cpu", dtype)

    def _look_at(self, running: Running) -> None:
        """Validate and show it; the result of a long merge is not lost if that fails."""
        self.validation = None
        try:
            self.validation = self._validated(running)
            summary = self.validation.summary()
            logger.info("validation:\n%s", summary)
            if self._job.run.progress and not _is_heard():
                say(summary)
        except Exception as error:  # of a model, a template or a terminal
            warnings.warn(
                f"the merge is done, but it could not be validated: {error}\n"
                "validate_merge(model) tries again",
                stacklevel=3,
            )

    def _validated(self, running: Running) -> Comparison:
        """A result beside what it was made of."""
        how = self._job.validation
        comparison = compare(
            [*self._candidates(running)],
            texts=how.texts,
            prompts=how.prompts,
            settings=Settings(
                metrics=how.metrics,
                chat=how.chat,
                max_new_tokens=how.max_new_tokens,
                batch_size=how.batch_size,
            ),
            tell=self._say,
        )
        return replace(comparison, notes=(*how.notes, *comparison.notes))

    def _candidates(self, running: Running) -> Iterator[Candidate]:
        """What is compared, with names that differ."""
        job = self._job
        models: list[tuple[str, Role, str | None]] = []
        if not job.validation.quick:
            models += [(name, "source", path) for name, path in job.sources.items()]
            if job.base_model is not None:
                models.append((last_part(job.base_model), "base", job.base_model))
        merged = "merged" if job.output_dir is None else Path(os.path.abspath(job.output_dir)).name
        models.append((merged, "merge", None))
        names = numbered([name for name, _, _ in models])  # sources keep theirs
        for name, (_, role, path) in sorted(
            zip(names, models, strict=True), key=lambda each: ROLES.index(each[1][1])
        ):
            load = partial(load_to_run, path or "")
            yield Candidate(
                name, role, (lambda: running) if path is None else partial(self._loaded, load)
            )

    def _tokenizer(self, *, needed: bool = False) -> "PreTrainedTokenizerBase | None":
        """The tokenizer of the result, also of one that another merger has made."""
        if self.tokenizer is None:
            job = self._job
            try:
                if isinstance(job.work, Recipe):
                    self.tokenizer = merged_tokenizer(replace(job.work, output_dir=None))
                else:
                    self.tokenizer = tokenizer_of(next(iter(job.sources.values())))
            except NoTokenizerError:
                if needed:
                    raise
                self._tell("the models have no tokenizer, so the result has none")
        return self.tokenizer

    def _tell(self, *notes: str) -> None:
        """Notes, by the log if someone listens to it."""
        self.notes = tuple(dict.fromkeys((*self.notes, *notes)))
        for note in notes:
            logger.info("%s", note)
            if not _is_heard():
                teller(show=self._job.run.progress)(note)

    def _say(self, step: str) -> None:
        logger.info("%s", step)
        if self._job.run.progress and not _is_heard():
            say(step, error=True)


def _is_heard() -> bool:
    """Whether someone listens to the log, so that nothing need be said beside it."""
    return logger.isEnabledFor(logging.INFO) and logger.hasHandlers()


def check_model_compatibility(models: Sequence[Mapping[str, Any]]) -> None:
    """Whether models fit together as they are.

    Args:
        models: as in a `MergeConfig`.

    Raises:
        ModelCompatibilityError: they do not, or their vocabularies differ (which a merge can bring
            together); all that is wrong is said at once.
        ValueError: an entry is wrong.
    """
    strict = {"vocabulary": "error", "verbose": False}
    config = MergeConfig("weighted", [dict(each) for each in models], options=strict)
    ModelMerger(config).check_compatibility()
