"""Which layers of which models make each tensor of the result, and where in its slice it stands.

A recipe without slices takes all layers of all models in their order; with slices, each says which
layers of which models make the next layers of the result (a "frankenmerge").
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from merge_recipe import LayerRange, Recipe, Slice
from merge_stream import Input
from model_checks import EMBEDDING, Model, ModelDescription
from model_prep import AlignedTensor

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
PER_LAYER = "layer_types"
"""The entry of config.json that lists something of every layer."""


class Place(NamedTuple):
    """Where a tensor of the result comes from.

    Attributes:
        aligned: its shape and rows.
        inputs: what feeds it, that of the base (if any) first.
        slice: index of the slice that it belongs to; 0 where there are none.
        t: where in its slice its layer is, from 0 for the first to 1 for the last; 0 for what is in
            no layer, as in mergekit.
        names: what the models that are merged, without the base, call it; for what is in no layer,
            its name in the result.
    """

    aligned: AlignedTensor
    inputs: tuple[Input, ...]
    slice: int
    t: float
    names: tuple[str, ...]


def views(recipe: Recipe, models: Sequence[Model]) -> Sequence[Model]:
    """The models as they have to fit together: with slices, by one layer of each."""
    return [_one_layer(model) for model in models] if recipe.slices else models


def _one_layer(model: Model) -> ModelDescription:
    config = {**model.config, "num_hidden_layers": 1}
    config.pop(PER_LAYER, None)
    tensors = {
        name: info for name, info in model.tensors.items() if (_layer(name) or (0, ""))[0] == 0
    }
    return ModelDescription(model.label, config, tensors, model.tokens)


def _layer(name: str) -> tuple[int, str] | None:
    """The number of a tensor's layer and its name within it; None for what is in no layer."""
    found = LAYER.match(name)
    return None if found is None else (int(found[1]), found[2])


def slice_problems(recipe: Recipe, models: Mapping[str, Model]) -> Iterator[str]:
    """Layers that a model does not have."""
    for number, each in enumerate(recipe.slices):
        for model, first, stop in each.inputs:
            count = models[model].config.get("num_hidden_layers")
            if isinstance(count, int) and stop > count:
                yield (
                    f"slice {number + 1}: layer_range [{first}, {stop}] of {model}, which has "
                    f"{count} layers. Take some of 0 to {count - 1}: at most [0, {count}]"
                )


def placed(recipe: Recipe, tensors: Mapping[str, AlignedTensor], layers: int) -> dict[str, Place]:
    """Every tensor of the result in the order of its layers, and where it comes from.

    Args:
        recipe: what to merge.
        tensors: as `align` gives them for `views`.
        layers: of the first model.
    """
    if not recipe.slices:
        models = len(recipe.models)
        return {name: _of_all(name, tensor, layers, models) for name, tensor in tensors.items()}
    index = {name: number for number, name in reversed([*enumerate(recipe.names)])}
    before = [each for each in tensors.items() if each[0] == EMBEDDING]
    after = [each for each in tensors.items() if _layer(each[0]) is None and each not in before]
    within = [each for each in tensors.items() if _layer(each[0]) is not None]
    places = dict(_outside(before, index, recipe.slices[0], 0))
    total = 0
    for number, each in enumerate(recipe.slices):
        for position in range(each.length):
            places.update(_of_layer(within, index, each, number, position, total))
            total += 1
    places.update(_outside(after, index, recipe.slices[-1], len(recipe.slices) - 1))
    return places


def _of_all(name: str, tensor: AlignedTensor, layers: int, models: int) -> Place:
    """A tensor that every model has under its name."""
    layer = _layer(name)
    inputs = tuple(Input(model, source) for model, source in enumerate(tensor.sources))
    t = 0.0 if layer is None else _position(layer[0], layers)
    return Place(tensor, inputs, 0, t, (name,) * models)


def _position(number: int, layers: int) -> float:
    return 1.0 if layers == 1 else number / (layers - 1)


def _outside(
    tensors: Sequence[tuple[str, AlignedTensor]],
    index: Mapping[str, int],
    of_slice: Slice,
    number: int,
) -> Iterator[tuple[str, Place]]:
    """Tensors in no layer are those of the models of the first or the last slice."""
    for name, tensor in tensors:
        models = [index[each.model] for each in of_slice.inputs]
        inputs = tuple(Input(model, tensor.sources[model]) for model in models)
        yield name, Place(tensor, inputs, number, 0.0, (name,) * len(of_slice.sources))


def _of_layer(
    tensors: Sequence[tuple[str, AlignedTensor]],
    index: Mapping[str, int],
    of_slice: Slice,
    number: int,
    position: int,
    layer: int,
) -> Iterator[tuple[str, Place]]:
    """The tensors of a layer of the result, from a slice's layers at a position."""
    t = _position(position, of_slice.length)
    for name, tensor in tensors:
        part = name.split(".", 3)[3]
        inputs = tuple(
            Input(index[model], f"model.layers.{first + position}.{part}")
            for model, first, _ in of_slice.inputs
        )
        names = tuple(each.tensor for each in inputs[-len(of_slice.sources) :])
        yield f"model.layers.{layer}.{part}", Place(tensor, inputs, number, t, names)


def config_changes(recipe: Recipe, models: Mapping[str, Model]) -> dict[str, Any]:
    """Entries of config.json that tell of the layers, with slices."""
    if not recipe.slices:
        return {}
    changes: dict[str, Any] = {"num_hidden_layers": sum(each.length for each in recipe.slices)}
    kinds = [
        kind
        for each in recipe.slices
        for kind in _layer_kinds(each.inputs[0], models[each.inputs[0].model].config)
    ]
    if len(kinds) == changes["num_hidden_layers"]:
        changes[PER_LAYER] = kinds
    return changes


def _layer_kinds(layers: LayerRange, config: Mapping[str, Any]) -> list[Any]:
    """What a config lists of some layers; nothing if it does not."""
    kinds = config.get(PER_LAYER)
    return kinds[layers.first : layers.stop] if isinstance(kinds, list) else []
