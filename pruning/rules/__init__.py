"""How labels travel through ATen operators: one table of small functions.

Every index along a prunable dimension carries an integer label. A rule reads the labels of an operator's inputs,
ties the labels that must be kept or removed together, and labels the outputs. To teach the tracer an operator, add
its name to ``RULES`` (and to ``MACS`` if it multiplies and accumulates) in ``table.py``; an operator without a rule
freezes every label it touches, unless torch marks it as elementwise. Where the code states a size (``view``, ``split``,
a slice) a rule goes on as if the size followed the width and says so (``Propagation.state``);
``secateur.pruning.trial`` then finds out whether it does.
"""

from secateur.pruning.rules.labels import MAKES, Dim, Labels, Propagation, Rule, TensorMap, weight_name
from secateur.pruning.rules.operators import operator_of, tensors_in
from secateur.pruning.rules.table import ATTENTIONS, RULES, Factor, macs_of, propagation, written_by

__all__ = [
    "ATTENTIONS",
    "MAKES",
    "RULES",
    "Dim",
    "Factor",
    "Labels",
    "Propagation",
    "Rule",
    "TensorMap",
    "macs_of",
    "operator_of",
    "propagation",
    "tensors_in",
    "weight_name",
    "written_by",
]
