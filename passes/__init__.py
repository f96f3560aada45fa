"""The pipeline on one page: from any ONNX model to the same network in another size, checked.

Stages stand in their order, and in each the modules in the order in which they run; helpers of a
module stand indented below it. A stage imports itself and those above it.

canonical: any ONNX model -> the canonical model: constants folded, every size known, names kept
    fix_inputs          inputs that hold one value become constants, and what follows from them
        branches            an If whose condition is known becomes the branch that is taken
    join_files          files that are one network become one model
        shared_weights      weights that several of them hold
        split_files         the way back: what each file holds of a model
    canonicalize        the recipe: inline, sort, fold, split, name
        inline              local functions, and the order of nodes
        fold            one walk over the nodes: sizes, constants, operators that do nothing
        infer_shapes    types and sizes of results
        ask_runtime     those that nobody knows, from a run of the node in ONNX Runtime
        fold_values     what single nodes compute from constants
        split_sequences SplitToSequence and SequenceAt become Split
        choices         inputs that choose the branch of an If, and by which values
        lengths         inputs that count keys, and what they are without padding
        separate_packed packed queries, keys and values become three operands
        keep_rows_apart heads that are normalized one by one stay an axis of their own
        dynamic_sizes   sequences, heights and widths that stay dynamic
        dynamic_batch   a batch that stays dynamic
        size_runs       the recipe's runs at several sizes, compared
        caches          inputs and outputs that hold keys and values of earlier positions
        relate_sizes    open sizes that follow from others, as the outputs tell
        declared        what the file declares, kept for what is written
        symbols         the dynamic sizes, and what they are analysed with
        untie           constants that were stored once become one per reader
        expected        what numbers the readers of an input expect
    restore             back from there: in a resized model, what was folded and is the same
    fold_affine         for a file that is shipped: scales and shifts in the layers beside

coupling: the canonical model -> the channel graph
    couple              every operator's factors, laid on the axes of its values
        numbers         axes whose positions are numbered, and those that are read by the numbers
    group               classes, pins, carriers, and the channels that they leave
        factorize_axes  axes that several factors share, refined until all operators agree
        carriers        which factor of a product axis may change, and what keeps its size
        views           product axes of which several factors may change, each in a view
        roles           what every factor does at its operator: makes, sums, normalizes, ties
    fixed_readers       bins that constants count, held unless somebody asks for them
    frozen              what frozen kernels make, held in the same way

lift: canonical and coupling in one call

analysis: the channel graph -> facts about it
    evaluate            a part of a model, run in ONNX Runtime
    liveness            what goes and what becomes constant when whole groups go
        deaths              the same with one death after the other: what each changes
    past                who reads how long a cache is
    least               how many channels a group must have
    selection           which positions of every axis stay when channels go
    changed             which values become others then, and which are slices of what they were
    dependence          which positions depend on a graph input
    cost                what a network costs at any widths
        polynomial      sums of products of widths, with value and gradient
        measured        milliseconds of a device that was measured, kernel by kernel
        along           the same at widths that change step by step: what a step touches
    channel_sources     which slices of which parameters belong to a channel
        computed_kernels the numbers of those that no parameter holds
    score               how much the network uses each channel
    rows                tables whose rows are named by number: embeddings
    branches            which parts of a residual network can go as a whole
    gates               which learned scales switch which groups off
    zeros               where dead channels are zero, whatever the inputs are
    recount             means that counted dead channels, and the weights that make up for it
    silence             what has to be zero beside a dead channel, so that nobody reads it
    convolutions        which ones ONNX Runtime computes in blocks of channels, by widths

planning: facts and a budget -> a plan: which channels stay
    bounds              which widths a plan may give
        steps           which multiples of channels suit runtimes, by group
        grids           multiples of a number of channels, as a group counts them
        same            groups that are named together, and those that get one width
        ties            widths that go together, because a config says them with fewer numbers
    outputs             the channels of classes and tokens that are to stay
        vocabulary          which tokens a text uses, and where a network has them
    constraints         budgets as limits on costs
        finer           finer steps where a budget needs them, for as few groups as possible
    build               from widths or channels to a plan
    removal_path        plans for a budget
        path            channels leave one by one until the budget is met
        lowest          the least of numbers that change a few at a time
        parts           what whole branches save, and lose where no inputs tell
        allocate        the widths with the least sum of scores, on one scale for the whole network
        exact           the widths with the least loss, by HiGHS, where the choice is small
    uniform             one ratio for all widths, and widths by hand
    expand              the largest multiplier of a plan's widths that fits
    nested              plans for several budgets, each a part of the last, and those in between
    compose             several plans as one, held against the first network

rewrite: the channel graph and a plan -> another model
    mask                the original with removed channels silenced
    absorb              removed channels that were constant, and what they contributed
    resize              every axis keeps the positions of the channels that stay
        vanish          layers of width 0 are cut
        bias            a constant added to a result: in a bias, or by an addition
        fresh               newly drawn weights

calibration: the channel graph and inputs -> what the channels are to the network that computes
    statistics          one walk through the original: moments at every reader, orders of removal
        readers         linear operators whose kernels may change, and what follows them
        kernels         where a kernel is stored: as it is, transposed, joined of several
        chosen          products with kernels that the network chooses from a stack
        together        an order of nodes in which those that share a kernel come together
        visits          the walk from where something is looked at to the next
        segments        the model in pieces, cut where something is looked at
        batches         what is live at a cut, for all inputs, in memory or in files
        moments         means and second moments, streamed; ridge regression from them
        group_readers   which inputs of them a group's channels are
        removal         which channels go first if those that stay take over
        looked_at       what is looked at, in order, and the moments of what is seen
        uncompensated   what channels cost tied kernels, where nothing takes over
        arrivals        where a layer's results go, moved, scaled or turned in pairs
        operands        operands of products, and the layers that make them
        scales          numbers that queries are multiplied with behind a norm of their own
        ahead           the layer ahead of such a norm
        logits          products of queries and keys
        factors         turned queries: a complex number per pair
        normed          queries with a norm: factors of what scales them behind it
        compared        what the inputs make of their operands: second moments
        bases           what makes up for elements that such a product loses
        mixing          mixtures ahead of norms that make up for elements that go
        narrowed        what the norms of a narrower network are, and what they are given
        stacks          what units of experts, and the experts, give where they are chosen
        fused           the same inside of a mixture in one node, which shows it
        few_bits        kernels in few bits as real numbers, and the nearest to others
        dense           the same where all experts compute every token
        shares          how much of that is mixed, place by place
    choices             how often others are chosen, where nothing tells what they give
    skips               what the outputs lose where a whole branch is left out
    curves              what each group's width costs the outputs; a score per channel
        carried         many networks with a change each, beside the original in one walk
        outputs         errors of the outputs, batch by batch
        perplexity      of language models: how well they foretell the inputs

refit: original, which channels stay, inputs -> the resized model with fitted kernels
    refit               both models in lockstep, layer after layer
        network         one of both models, and what is live where it stands
        fit             kernel and bias of one layer
        experts         the kernels of a stack, each on the places that choose it
        shift           adding to what a layer gives
        unfitted        kernels that lose inputs, and that no fit reaches
    room                budgets less the biases that a fit adds

checking: original, plan, resized model -> a report
    fixing              the network of fixed inputs against the file that takes them
    verdict             what a check says: the errors of all that was compared
    verify              the resized model against the masked original
        networks        what is compared: the original, the masked one, the resized one
        decoding        two steps of generation, for a network with a cache
        smaller         inputs on which the check proves the same with less work
        shorter         networks of fewer positions on which it proves the same
        following       which sizes follow, and what in the model holds them
        single_precision the same network in float32, where every kernel exists
        stepwise        every value inside, from the masked original's operands
        compare         one array beside another, at the positions that stay
    sensitivity         what halving each group alone does to the outputs
"""
