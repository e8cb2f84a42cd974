"""Fine-tuning: a new run that starts from the weights of a pipeline, labels matched by name."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from complexity_dit.compatibility import check_meaning
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sampling import load_pipeline
from inl_core.run.errors import UserError

logger = logging.getLogger(__name__)


def start_from(
    model: ComplexityDiTTransformer2DModel,
    pipeline: str,
    label_names: Mapping[str, Sequence[str]],
) -> None:
    """Give a new model the weights of a trained one.

    Labels are matched by field and name. A label that the pipeline does not know starts from its
    field's null row, and a new field from zeros, so that the model begins by painting such a
    picture as it painted one without that label. A field that the data lack is "not given" from now
    on: its null row moves into the bias that it was always added to.

    Args:
        model: The new model, changed in place.
        pipeline: Pipeline folder or Hub id.
        label_names: Of the data, in id order: the rows of the new model's label tables.

    Raises:
        UserError: If there is no such pipeline, or its network is another one than the model but
            for labels and size of the picture.
    """
    source = load_pipeline(pipeline)
    check_meaning(source.transformer.config, model.config, f"--init_from {pipeline}")
    old = dict(source.transformer.named_parameters())
    tables = {name for name in (*old, *dict(model.named_parameters())) if "label_embed." in name}
    own = {name: p for name, p in model.named_parameters() if name not in tables}
    differences = [f"{name} is missing" for name in own if name not in old]
    differences += [f"{name} is unknown" for name in old if name not in own and name not in tables]
    differences += [
        f"{name} is {tuple(old[name].shape)} there and {tuple(p.shape)} here"
        for name, p in own.items()
        if name in old and old[name].shape != p.shape
    ]
    if differences:
        raise UserError(
            f"--init_from {pipeline} is of another model ({len(differences)} tensors differ): "
            f"{'; '.join(differences[:3])}; use the model settings it was trained with"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(old[name])
        for field, names in label_names.items():
            model.label_embed[field].weight.copy_(_table(source, field, names))
        for field in source.label_names:
            if field not in label_names:
                model.time_embed.linear_2.bias += _rows(source, field)[-1]
    logger.info("started from the weights of %s", pipeline)


def _rows(source: ComplexityDiTPipeline, field: str) -> Tensor:
    return source.transformer.label_embed[field].weight.detach()


def _table(source: ComplexityDiTPipeline, field: str, names: Sequence[str]) -> Tensor:
    """Rows of a field's new table: known labels, others, and the null row at the end."""
    if field not in source.label_names:
        logger.info("label field %s is new: all of its %d names start at zero", field, len(names))
        return torch.zeros(len(names) + 1, source.transformer.config.hidden_size)
    rows, known = _rows(source, field), source.label_names[field]
    new = [name for name in names if name not in known]
    if new:
        logger.info("new %s names start from the null row: %s", field, ", ".join(new))
    null = len(known)
    chosen = [known.index(name) if name in known else null for name in names]
    return rows[[*chosen, null]]
