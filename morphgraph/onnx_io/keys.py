"""The keys under which the program notes what ONNX has no field for."""

OWN_PREFIX = "morphgraph."
"""What all of them in a file begin with, and no others."""

# In ``Model.metadata_props``, which stands in the file, as JSON:
PARAMETERS_KEY = "morphgraph.parameters"  # names of the initializers that training changes
BUFFERS_KEY = "morphgraph.buffers"  # names of those that are persistent buffers of the network
FROZEN_KEY = "morphgraph.frozen"  # names of parameters that had requires_grad=False
STILL_KEY = "morphgraph.still"  # names of running means that no batch moves: a momentum of 0
TIED_KEY = "morphgraph.tied"  # by every further name of a parameter the one that it stands under
OUTPUTS_KEY = "morphgraph.outputs"  # the structure that the network's results come in
INPUTS_KEY = "morphgraph.inputs"  # the structure that the network's arguments come in
CONSTANTS_KEY = "morphgraph.constants"  # names of those that stand in for layers of width 0
ABSORBED_KEY = "morphgraph.absorbed"  # removed channels that were absorbed as constants, by group
FIXED_KEY = "morphgraph.fixed"  # by input that callers no more give the value that it is fixed to
JOINED_KEY = (
    "morphgraph.joined"  # the files that a model is joined of, and its outputs between them
)
PREPROCESSING_KEY = "morphgraph.preprocessing"  # how images become the network's input
ORIGIN_KEYS = tuple(  # where a resized model comes from: see morphgraph.origin
    f"{OWN_PREFIX}{name}"
    for name in (
        *("version", "base", "plan", "budget", "cost", "check", "error"),
        *("base_file", "earlier"),
    )
)

# In ``Node.metadata_props``, or in lines of ``Node.doc_string`` before IR version 10, as text:
MAKES_KEY = "morphgraph.groups"  # the channel groups on a node's results
READS_KEY = "morphgraph.reads"  # those that it reads and that do not stand on its results

# In ``Model.meta``, in memory only:
CANONICAL_KEY = "morphgraph.canonical"  # true: the model is in canonical form
DECLARED_KEY = "morphgraph.declared"  # what the file declares that is restored when it is resized
ORIGINAL_KEY = "morphgraph.original"  # the model before it was folded, with the same node names
COPIES_KEY = "morphgraph.copies"  # by the name of a constant's copy that of the constant
UNFIXED_KEY = "morphgraph.unfixed"  # the model before its inputs were fixed
ALIASES_KEY = "morphgraph.aliases"  # by constant and reader the name that an Identity had given

# In ``Node.meta``, in memory only:
CHOICE_KEY = "morphgraph.choice"  # of an If: which input decides it, and what to do

# In ``Value.meta``, in memory only, in models with dynamic sizes:
STATIC_SHAPE_KEY = "static_shape"  # the sizes that a value is analysed with
DEFAULT_KEY = "default"  # of an input that callers may leave out: what it is then
DYNAMIC_AXES_KEY = "dynamic_axes"  # the axes whose size depends on one that is not the batch
EXPECTED_KEY = "expected"  # of an input: what numbers its readers expect, an Expected
EXPECTED_PARTS_KEY = "expected_parts"  # of an input: the same of some of its positions, a tuple
UNSIZED_KEY = "unsized"  # true: nobody knows its size before the model runs
