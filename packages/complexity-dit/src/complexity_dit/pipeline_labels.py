"""Labels of a pipeline: their names, ids by name, and the condition that the network is given.

A mixin, because every pipeline of this package is asked for pictures in the same words.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from complexity_dit.labels import resolve_label
from complexity_dit.transformer import ComplexityDiTTransformer2DModel
from inl_core.run.errors import UserError

LabelValue = str | int | None


def read_id2label(
    id2label: Mapping | None, transformer: ComplexityDiTTransformer2DModel
) -> dict[str, dict[int, str]]:
    """Names of the labels, in the transformer's field order, with whole numbers as ids.

    Raises:
        UserError: If they are not those that the transformer was built for.
    """
    config = transformer.config
    fields = dict(zip(config.label_fields, config.num_classes, strict=True))
    if id2label is None:
        id2label = {field: {i: str(i) for i in range(n)} for field, n in fields.items()}
    if not isinstance(id2label, Mapping) or not all(
        isinstance(names, Mapping) and all(isinstance(name, str) for name in names.values())
        for names in id2label.values()
    ):
        raise UserError("id2label is no table of names: it is {field: {id: name}}, names are text")
    if {field: len(names) for field, names in id2label.items()} != fields:
        raise UserError(
            f"id2label names {', '.join(f'{len(v)} of {k}' for k, v in id2label.items())}; the "
            f"transformer was built for {fields}: pass the id2label it was trained with"
        )
    # JSON turned integer keys into strings and sorted the fields: undo both.
    table = {field: {str(i): name for i, name in id2label[field].items()} for field in fields}
    for field, names in table.items():
        if set(names) != {str(i) for i in range(len(names))}:
            raise UserError(
                f"the ids of {field} in id2label are {', '.join(map(repr, list(names)[:5]))}, …; "
                f"expected 0 to {len(names) - 1}"
            )
    return {field: {int(i): name for i, name in names.items()} for field, names in table.items()}


class LabelsMixin:
    """What a pipeline knows about its labels. Needs `transformer` and `config.id2label`."""

    transformer: ComplexityDiTTransformer2DModel
    config: Any

    @property
    def id2label(self) -> dict[str, dict[int, str]]:
        """Names by field and id: those of the network, then those that adapters brought."""
        # Another denoiser behind the same arguments (see `train`) takes no adapters.
        added = getattr(self.transformer, "added_labels", {})
        return {
            field: names | dict(enumerate(added.get(field, ()), len(names)))
            for field, names in self.config.id2label.items()
        }

    @property
    def label_names(self) -> dict[str, list[str]]:
        """Label names per field, in id order."""
        return {f: [names[i] for i in range(len(names))] for f, names in self.id2label.items()}

    def get_label_ids(self, **labels: LabelValue | Sequence[LabelValue]) -> Tensor:
        """Turn labels by name or id into the transformer's `class_labels`.

        Args:
            **labels: One value or a list per field; None (or a field left out) means not given.
                Lists must be of one length, single values are repeated to it.

        Returns:
            Label ids, (B, F) int64, -1 where not given.

        Raises:
            UserError: For an unknown field or label (near names are listed) or unequal lists.
        """
        unknown = sorted(set(labels) - set(self.id2label))
        if unknown:
            raise UserError(
                f"unknown label field {unknown[0]!r}; this pipeline has "
                f"{', '.join(self.id2label) or 'no label fields'}"
            )
        lists = {f: v for f, v in labels.items() if isinstance(v, list | tuple)}
        lengths = {field: len(values) for field, values in lists.items()}
        if len(set(lengths.values())) > 1 or 0 in lengths.values():
            raise UserError(f"lists of labels must be of one length above 0, got {lengths}")
        batch = next(iter(lengths.values()), 1)
        columns = []
        for field, names in self.label_names.items():
            values = labels.get(field)
            row = list(values) if field in lists else [values] * batch
            columns.append([resolve_label(names, value, field) for value in row])
        return torch.tensor(columns, dtype=torch.long).reshape(len(columns), batch).T.contiguous()

    @torch.no_grad()
    def get_label_embeds(self, **labels: LabelValue | Sequence[LabelValue]) -> Tensor:
        """What labels mean to the network, (B, D), to blend and to pass as `label_embeds`.

        Args:
            **labels: As for `get_label_ids`.
        """
        device = self.transformer.device
        return self.transformer.embed_labels(self.get_label_ids(**labels).to(device))

    def _condition(
        self,
        class_labels: Tensor | None,
        label_embeds: Tensor | None,
        labels: Mapping[str, LabelValue | Sequence[LabelValue]],
    ) -> Tensor:
        """Label ids (B, F), or embeddings (B, D): what was given, in one of three ways."""
        given = {"class_labels": class_labels is not None, "label_embeds": label_embeds is not None}
        names = [name for name, is_given in given.items() if is_given] + list(labels)
        if (class_labels is not None or label_embeds is not None) and len(names) > 1:
            raise UserError(f"give {names[0]} or {', '.join(names[1:])}, not both")
        if label_embeds is not None:
            width = self.transformer.config.hidden_size
            if label_embeds.ndim != 2 or label_embeds.shape[1] != width:
                raise UserError(
                    f"label_embeds of shape {tuple(label_embeds.shape)} must be (B, {width}), as "
                    "get_label_embeds makes them"
                )
            return label_embeds
        return self.get_label_ids(**labels) if class_labels is None else class_labels
