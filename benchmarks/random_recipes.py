"""Random recipes in mergekit's grammar, with parameters at every level that it has."""

import random
from typing import Any

LAYERS = 5
MODELS = ("base", "one", "two", "three")
FILTERS = (
    *("self_attn", "mlp", "q_proj", "layernorm", "embed_tokens", "lm_head", "norm", "layers.1."),
    *("weight", "*"),
)

METHODS: dict[str, tuple[str, ...]] = {
    "linear": ("weight",),
    "slerp": ("t",),
    "nuslerp": ("weight",),
    "task_arithmetic": ("weight", "lambda"),
    "ties": ("weight", "density", "lambda", "normalize"),
    "dare_ties": ("weight", "density", "lambda", "rescale"),
    "della_linear": ("weight", "density", "lambda"),
    "breadcrumbs": ("weight", "density", "gamma", "lambda"),
    "passthrough": ("scale",),
}
"""Of each method, parameters to set."""

OF_MODELS = ("weight", "density", "gamma", "scale")
FEW = {"slerp": 2, "nuslerp": 2, "passthrough": 1}
RANGES = {"density": (0.2, 0.8), "gamma": (0.0, 0.15), "t": (0.0, 1.0)}
SWITCHES = ("normalize", "rescale")


class RecipeMaker:
    """Makes one recipe after the other, the same ones for a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def recipe(self) -> dict[str, Any]:
        """A recipe that mergekit accepts; a method without a base has its models alone."""
        method = self.random.choice([*METHODS])
        models = self.random.sample(MODELS[1:], k=FEW.get(method) or self.random.choice([2, 3]))
        recipe: dict[str, Any] = {"merge_method": method, "dtype": "float32"}
        if method == "slerp":
            recipe["base_model"] = self.random.choice(models)
        elif method not in ("linear", "passthrough") and method != "nuslerp":
            recipe["base_model"] = MODELS[0]
        shape = self.random.choice(["models", "slices", "modules"])
        body: dict[str, Any] = recipe
        if shape == "modules":
            body = {}
            recipe["modules"] = {"default": body}
            body |= self._level(method, of_model=False)
        if shape == "slices" or (shape == "modules" and self.random.random() < 0.5):
            body["slices"] = self._slices(method, models, recipe.get("base_model"))
        else:
            body["models"] = [
                {"model": model, **self._level(method, of_model=True)} for model in models
            ]
        # the last resort, without which a tensor may have none
        parameters = {key: self._last_resort(key) for key in METHODS[method]}
        return {**recipe, "parameters": parameters}

    def _slices(self, method: str, models: list[str], base: str | None) -> list[dict[str, Any]]:
        slices = []
        for _ in range(self.random.choice([1, 2, 3])):
            length = self.random.choice([1, 2, LAYERS])
            inputs = [base, *models] if base is not None and base not in models else models
            sources = []
            for model in inputs:
                first = self.random.randint(0, LAYERS - length)
                source = {"model": model, "layer_range": [first, first + length]}
                if model != base or method in ("slerp", "linear"):
                    source |= self._level(method, of_model=True)
                sources.append(source)
            slices.append({"sources": sources, **self._level(method, of_model=False)})
        return slices

    def _level(self, method: str, *, of_model: bool) -> dict[str, Any]:
        keys = [key for key in METHODS[method] if not of_model or key in OF_MODELS]
        chosen = [key for key in keys if self.random.random() < 0.5]
        return {"parameters": {key: self._setting(key) for key in chosen}} if chosen else {}

    def _setting(self, key: str) -> Any:
        if self.random.random() < 0.5:
            return self._values(key)
        filters = self.random.sample(FILTERS, k=self.random.choice([1, 2, 3]))
        choices: list[dict[str, Any]] = [
            {"filter": each, "value": self._values(key)} for each in filters
        ]
        return choices + [{"value": self._values(key)}] * self.random.choice([0, 1])

    def _last_resort(self, key: str) -> Any:
        setting = self._setting(key)
        is_list = isinstance(setting, list) and isinstance(setting[0], dict)
        return [*setting, {"value": self._values(key)}] if is_list else setting

    def _values(self, key: str) -> Any:
        if self.random.random() < 0.5:
            return self._value(key)
        return [self._value(key) for _ in range(self.random.choice([1, 2, 3, 5]))]

    def _value(self, key: str) -> Any:
        if key in SWITCHES:
            return self.random.random() < 0.5
        low, high = RANGES.get(key, (0.1, 2.0))
        return self.random.choice([round(self.random.uniform(low, high), 2), low, high])
