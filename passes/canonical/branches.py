"""An If whose condition is known becomes the branch that is taken."""

import onnx_ir as ir

from morphgraph.edit import Editor
from morphgraph.onnx_io import subgraphs


def take_branch(node: ir.Node, is_true: bool, editor: Editor) -> list[ir.Node] | None:
    """Put what a branch of an If computes behind it; the If itself is left without readers.

    Values of the branch keep their names where these are free without the If; its initializers
    become the model's. The branch may give values from around the If, its own constants, or one
    value several times.

    Args:
        node: an If, in the main graph or in a body.
        is_true: what its condition is.
        editor: of the model.

    Returns:
        An Identity for each result, under the name of that result, behind the nodes of the branch;
        ``None``, and nothing has changed: the If has no such branch.
    """
    taken = node.attributes.get("then_branch" if is_true else "else_branch")
    if taken is None or len(taken.as_graph().outputs) != len(node.outputs):
        return None
    branch, around = taken.as_graph(), node.graph
    assert around is not None
    editor.release_subgraphs(node)
    results = list(branch.outputs)
    branch.outputs.clear()
    for value in list(branch.initializers.values()):
        tensor = branch.initializers.pop(value.name or "").const_value
        assert tensor is not None
        constant = editor.constant(value.name or "", tensor)
        value.replace_all_uses_with(constant)
        results = [constant if result is value else result for result in results]
    inner = list(branch)
    for child in inner:
        _name_results(child, editor)
    branch.remove(inner)
    ends = [ir.Node("", "Identity", [result]) for result in results]
    for old, new in zip(node.outputs, (end.outputs[0] for end in ends), strict=True):
        new.name, old.name = old.name, None
        new.type, new.shape = old.type, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    around.insert_after(node, [*inner, *ends])
    for graph in subgraphs(node):
        _forget(graph)
    return ends


def _forget(graph: ir.Graph) -> None:
    """Take the readers in a body that goes off the values that they read around it."""
    for node in graph:
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
        for inner in subgraphs(node):
            _forget(inner)


def _name_results(node: ir.Node, editor: Editor) -> None:
    """Give results of a node, and all values of its bodies, names that nothing else has."""
    values = list(node.outputs)
    for graph in subgraphs(node):
        values += dict.fromkeys([*graph.inputs, *graph.initializers.values()])
        for inner in graph:
            _name_results(inner, editor)
    for value in values:
        if value.name:
            value.name = editor.value_name(value.name)
