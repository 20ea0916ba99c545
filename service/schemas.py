"""What goes into the API and comes out of it."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Id = Annotated[str, Field(min_length=1, max_length=300, examples=["capitals"])]
"""A model's id; with adapters on top BASE+ADAPTER, or BASE+ADAPTER:0.5."""


MOST_ENTRIES = 100


class Request(BaseModel):
    """Entries by name, of which not each may need a message of its own."""

    @model_validator(mode="before")
    @classmethod
    def _few(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MOST_ENTRIES:
            raise ValueError(f"{len(value)} entries, expected at most {MOST_ENTRIES}")
        return value


class ModelEntry(Request):
    """A model of a merge, with its weight, or other parameters that it alone has."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": True})

    id: Id

    @property
    def parameters(self) -> dict[str, Any]:
        """Its own parameters, by the names that recipes have for them."""
        return self.model_extra or {}


class EvaluationRequest(Request):
    """What the base, the sources and the merge are compared by."""

    model_config = ConfigDict(extra="forbid")

    prompts: list[Annotated[str, Field(min_length=1, max_length=4000)]] = Field(
        default_factory=list, max_length=20, description="to be answered by each model"
    )
    text: str = Field("", max_length=400_000, description="for the perplexity")
    max_new_tokens: int = Field(64, ge=1, le=512, description="of an answer, at most")
    chat: bool = Field(False, description="put prompts into the models' chat templates")


class ExperimentRequest(Request):
    """A merge: a method with models, or a whole recipe.

    Whatever else a recipe file can say at its top (dtype, profile, vocabulary, include, ...) can be
    said here as well.
    """

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "additionalProperties": True,
            "examples": [
                {
                    "name": "Two specialists",
                    "method": "linear",
                    "models": [
                        {"id": "capitals", "weight": 0.6},
                        {"id": "elements", "weight": 0.4},
                    ],
                    "parameters": {},
                }
            ],
        },
    )

    name: str = Field("", max_length=200, description="what to call it; by default its method")
    method: str | None = Field(None, max_length=100, description="ties, slerp, linear, dare, ...")
    base_model: Id | None = Field(None, description="common ancestor, where the method has one")
    models: list[ModelEntry] = Field(default_factory=list, max_length=64)
    parameters: dict[str, Any] = Field(
        default_factory=dict,
        description="of the method: density, lambda, t (or alpha), drop_rate, seed, ...",
    )
    recipe: str | None = Field(
        None, max_length=200_000, description="instead: a recipe in YAML, as mergekit has them"
    )
    findings: bool | None = Field(
        None, description="find out where the models disagree; by default where that can be"
    )
    evaluation: EvaluationRequest | None = Field(
        None, description="compare the models when they are merged"
    )


class Problem(BaseModel):
    """Something wrong with a request, or with a job."""

    where: str = Field(description="the entry, as models[1].weight; empty for the whole")
    text: str


class Failure(BaseModel):
    """The body of every error."""

    success: Literal[False] = False
    error: str
    problems: list[Problem] = []


class Success(BaseModel):
    """The body of what went well."""

    success: Literal[True] = True


class Model(BaseModel):
    """A model that can be merged."""

    id: str
    name: str
    kind: Literal["model", "adapter"]
    size: str = Field(description="parameters, as 7B")
    architecture: str
    download_size: str = Field(description="of its weights, as 13.5GB")
    bytes: int
    hub_id: str | None = Field(description="where it is from, if that is the Hub")
    base_model: str | None = Field(description="id of an adapter's base, if it is among the models")
    available: bool = Field(description="it can be merged now")
    note: str = Field(description="why it cannot, or what to know of it")


class Models(Success):
    """All models."""

    models: list[Model]


class Step(BaseModel):
    """A moment in the life of a job."""

    time: str
    state: str
    text: str


class JobView(BaseModel):
    """A merge or an evaluation."""

    status: Literal["queued", "running", "completed", "failed", "cancelled"]
    progress: float = Field(description="in percent")
    step: str = Field(description="what is being done")
    done_bytes: int = Field(description="of an evaluation, models that are done")
    total_bytes: int = Field(description="of an evaluation, models")
    bytes_per_second: float | None
    seconds_left: float | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    problems: list[str]
    history: list[Step] = Field(description="empty in lists")


class EvaluationView(JobView):
    """A comparison of the models of an experiment with its result."""

    request: EvaluationRequest = Field(description="without its text in lists")
    result: dict[str, Any] | None = Field(description="null in lists")


class ModelUse(BaseModel):
    """A model of an experiment."""

    id: str
    role: Literal["base", "model"]


class File(BaseModel):
    """A file of a merged model."""

    name: str
    bytes: int
    sha256: str


class Result(BaseModel):
    """What a merge has made."""

    bytes: int
    files: list[File]
    seconds: float
    peak_memory: int = Field(
        description="without files that the system caches, as `memory_bytes` of a plan"
    )
    notes: list[str]
    available: bool = Field(description="False once it has been removed")


class Experiment(JobView):
    """A merge that was asked for."""

    id: str
    name: str
    method: str
    models: list[ModelUse]
    recipe: str = Field(description="as it was understood, in YAML; empty in lists")
    queue_place: int | None
    kept_until: str | None = Field(description="when its result will be removed")
    plan: dict[str, Any] = Field(description="empty in lists")
    result: Result | None
    evaluation: EvaluationView | None
    links: dict[str, str]


class Experiments(Success):
    """Experiments, the newest first."""

    experiments: list[Experiment]
    next: str | None = Field(description="where to go on; null at the end")


class OneExperiment(Success):
    """An experiment."""

    experiment_id: str
    experiment: Experiment


class PlanResult(Success):
    """What a request would do."""

    plan: dict[str, Any]
    recipe: str = Field(description="as it was understood, in YAML")


class Health(Success):
    """Whether all is well."""

    status: Literal["ok"] = "ok"
    version: str
    running: int
    queued: int
    free_disk: int
    memory_for_a_job: int | None
