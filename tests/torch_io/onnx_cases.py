"""Operators of ONNX, each alone in a model: inputs, nodes, and an opset where it matters.

``x`` and ``z`` are fed, all other inputs are random weights.
"""

IMAGE = "float[2,3,7,8] x"
POSITIVE = "float[2,3] u"

CASES = [
    # convolutions
    (f"{IMAGE}, float[4,3,3,3] w, float[4] b", "y = Conv <pads = [1,1,1,1]> (x, w, b)"),
    (f"{IMAGE}, float[4,3,3,2] w", "y = Conv <pads = [0,1,2,0], strides = [2,1]> (x, w)"),
    (f"{IMAGE}, float[4,3,3,3] w", 'y = Conv <auto_pad = "SAME_UPPER", strides = [2,2]> (x, w)'),
    (f"{IMAGE}, float[4,3,4,2] w", 'y = Conv <auto_pad = "SAME_LOWER", strides = [1,2]> (x, w)'),
    (f"{IMAGE}, float[4,3,2,2] w", 'y = Conv <auto_pad = "VALID", dilations = [2,3]> (x, w)'),
    (f"{IMAGE}, float[6,1,3,3] w, float[6] b", "y = Conv <group = 3> (x, w, b)"),
    ("float[2,4,9] x, float[6,2,3] w", "y = Conv <group = 2> (x, w)"),
    ("float[2,3,4,5,6] x, float[2,3,2,2,2] w", "y = Conv <strides = [1,2,1]> (x, w)"),
    ("float[2,3,7] x, float[4,3,3] v", "w = Abs(v) y = Conv (x, w)"),
    (f"{IMAGE}, float[3,4,3,3] w, float[4] b", "y = ConvTranspose <strides = [2,2]> (x, w, b)"),
    (
        f"{IMAGE}, float[3,2,3,3] w, float[2] b",
        "y = ConvTranspose <strides = [2,3], pads = [1,0,1,2], output_padding = [1,1]> (x, w, b)",
    ),
    (
        f"{IMAGE}, float[3,2,3,3] w",
        "y = ConvTranspose <strides = [2,2], pads = [1,1,1,1], output_padding = [1,1]> (x, w)",
    ),
    (
        f"{IMAGE}, float[3,2,3,3] w, float[2] b",
        "y = ConvTranspose <strides = [2,2], output_shape = [14,15]> (x, w, b)",
    ),
    (
        f"{IMAGE}, float[3,2,2,2] w, float[2] b",
        'y = ConvTranspose <strides = [2,2], auto_pad = "SAME_UPPER"> (x, w, b)',
    ),
    ("float[2,4,5] x, float[4,3,3] w", "y = ConvTranspose <group = 2, dilations = [2]> (x, w)"),
    # matrix products
    ("float[2,5] x, float[4,5] w, float[4] b", "y = Gemm <transB = 1> (x, w, b)"),
    ("float[2,5] x, float[5,4] w, float[4] b", "y = Gemm (x, w, b)"),
    ("float[2,5] x, float[5,4] w, float[1,4] b", "y = Gemm <alpha = 0.5, beta = 2.0> (x, w, b)"),
    ("float[2,5] x, float[4,5] w", "y = Gemm <alpha = 0.5, transB = 1> (x, w)"),
    ("float[5,2] x, float[4,5] w, float[1] b", "y = Gemm <transA = 1, transB = 1> (x, w, b)"),
    ("float[2,3,5] x, float[5,4] w", "y = MatMul (x, w)"),
    ("float[2,3,5] x, float[5] w", "y = MatMul (x, w)"),
    ("float[2,3,5] x, float[4,5] w, float[4] b", "t = Transpose(w) m = MatMul(x, t) y = Add(m, b)"),
    ("float[2,3,4] x, float[2,4,5] z", "y = MatMul (x, z)"),
    ("float[2,3,4] x, float[5,4] w", 'y = Einsum <equation = "bti, oi -> bto"> (x, w)'),
    ("float[2,3,4] x, float[4,5] w", 'y = Einsum <equation = "...i,iA->...A"> (x, w)'),
    ("float[2,3,4] x, float[2,4,5] z", 'y = Einsum <equation = "bij,bjk->bki"> (x, z)'),
    ("float[2,3,4] x", 'y = Einsum <equation = "bij->jb"> (x)'),
    # recurrent layers
    *(
        (f"float[5,2,3] x, {weights}", f"{results} = {kind} <hidden_size = 4{form}> ({operands})")
        for kind, gates, more in (
            ("LSTM", 4, ["", ", clip = 0.3", ", input_forget = 1"]),
            ("GRU", 3, ["", ", linear_before_reset = 1"]),
            ("RNN", 1, ["", ', activations = ["Relu"]']),
        )
        for direction, d, options in (
            ("forward", 1, more),
            ("reverse", 1, more),
            ("bidirectional", 2, more[:2] if kind != "RNN" else more[:1]),
        )
        for form in [f', direction = "{direction}"{option}' for option in options]
        for results in ("y", ", y")
        for operands in ("w, r", "w, r, b")
        for operands in ["x, " + operands]
        for weights in [
            f"float[{d},{gates * 4},3] w, float[{d},{gates * 4},4] r"
            + (f", float[{d},{gates * 8}] b" if operands.endswith("b") else "")
        ]
    ),
    *(
        (
            "float[5,2,3] x, float[2,16,3] w, float[2,16,4] r, float[2,32] b, float[2,2,4] h, "
            "float[2,2,4] c, float[2,12] p | int32[2] n = {3, 5}",
            f'{results} = LSTM <hidden_size = 4, direction = "bidirectional"> ({operands})',
        )
        for results in ("y", ", y", ", , y")
        for operands in (
            "x, w, r, b, , h, c",
            "x, w, r, b, , h",
            "x, w, r, , n",
            "x, w, r, b, , , , p",
            "x, w, r, b, n, h, c, p",
        )
    ),
    (
        "float[5,2,3] x, float[1,12,3] w, float[1,12,4] r, float[1,2,4] h | int32[2] n = {5, 2}",
        "y = GRU <hidden_size = 4> (x, w, r, , n, h)",
    ),
    *(
        (
            "float[5,2,3] x, float[1,4,3] w, float[1,4,4] r",
            f'y = RNN <hidden_size = 4, activations = ["{kind}"]{numbers}> (x, w, r)',
        )
        for kind, numbers in (
            ("Affine", ", activation_alpha = [0.5], activation_beta = [0.1]"),
            ("Elu", ""),
            ("HardSigmoid", ""),
            ("LeakyRelu", ", activation_alpha = [0.3]"),
            ("ScaledTanh", ", activation_alpha = [1.5], activation_beta = [0.7]"),
            ("Sigmoid", ""),
            ("Softplus", ""),
            ("Softsign", ""),
            ("ThresholdedRelu", ", activation_alpha = [0.2]"),
        )
    ),
    (
        "float[5,2,3] x, float[1,16,3] w, float[1,16,4] r",
        'y = LSTM <hidden_size = 4, activations = ["HardSigmoid", "ScaledTanh", "LeakyRelu"], '
        "activation_alpha = [0.3, 0.4, 0.2], activation_beta = [0.2, 0.9]> (x, w, r)",
    ),
    # norms
    (
        f"{IMAGE}, float[3] s, float[3] b, float[3] m, float[3] v",
        "y = BatchNormalization (x, s, b, m, v)",
    ),
    (
        "float[4,3] x, float[3] s, float[3] b, float[3] m, float[3] v",
        "y = BatchNormalization <epsilon = 0.01> (x, s, b, m, v)",
    ),
    (
        f"{IMAGE}, float[3] s, float[3] b, float[3] m, float[3] u",
        "v = Abs (u) y = BatchNormalization (x, s, b, m, v)",
    ),
    (f"{IMAGE}, float[3] s, float[3] b", "y = InstanceNormalization (x, s, b)"),
    ("float[2,3,6] x, float[6] s, float[6] b", "y = LayerNormalization (x, s, b)"),
    ("float[2,3,6] x, float[3,6] s", "y = LayerNormalization <axis = 1, epsilon = 0.001> (x, s)"),
    ("float[2,3,6] x, float[6] s, float[6] b", "y = LayerNormalization <axis = 1> (x, s, b)"),
    ("float[2,6,4,4] x", "y = LRN <size = 3, alpha = 0.1, beta = 0.5, bias = 2.0> (x)"),
    *(
        ("float[2,3,6] x", f"y = {kind} {axis} (x)")
        for kind in ("Softmax", "LogSoftmax", "Hardmax")
        for axis in ("", "<axis = 1>")
    ),
    ("float[2,6,4] x, float[6] s, float[6] b", "y = GroupNormalization <num_groups = 3> (x, s, b)"),
    *(
        (IMAGE, f"y = LpNormalization <axis = {axis}, p = {p}> (x)")
        for axis in (1, -1)
        for p in (1, 2)
    ),
    (IMAGE, "y = MeanVarianceNormalization (x)"),
    (IMAGE, "y = MeanVarianceNormalization <axes = [1, 2]> (x)"),
    # pools
    (IMAGE, "y = MaxPool <kernel_shape = [3,3], strides = [2,2], pads = [1,1,1,1]> (x)"),
    (IMAGE, "y = MaxPool <kernel_shape = [2,2], strides = [2,3], ceil_mode = 1> (x)"),
    (IMAGE, "y = MaxPool <kernel_shape = [3,2], pads = [0,1,2,0], strides = [2,2]> (x)"),
    (IMAGE, "y = MaxPool <kernel_shape = [2,2], dilations = [2,3]> (x)"),
    (IMAGE, 'y = MaxPool <kernel_shape = [3,3], auto_pad = "SAME_UPPER", strides = [2,2]> (x)'),
    ("float[2,3,9] x", "y = MaxPool <kernel_shape = [3], ceil_mode = 1, strides = [2]> (x)"),
    (IMAGE, "y = AveragePool <kernel_shape = [3,3], strides = [2,2], pads = [1,1,1,1]> (x)"),
    (IMAGE, "y = AveragePool <kernel_shape = [3,3], pads = [1,1,1,1], count_include_pad = 1> (x)"),
    (IMAGE, "y = AveragePool <kernel_shape = [3,2], pads = [0,1,2,0], strides = [2,1]> (x)"),
    (
        IMAGE,
        "y = AveragePool <kernel_shape = [3,2], pads = [0,1,2,0], count_include_pad = 1> (x)",
    ),
    (IMAGE, "y = AveragePool <kernel_shape = [2,2], dilations = [2,3], strides = [1,2]> (x)"),
    (IMAGE, "y = AveragePool <kernel_shape = [3,3], strides = [2,2], ceil_mode = 1> (x)"),
    (IMAGE, 'y = AveragePool <kernel_shape = [3,3], auto_pad = "SAME_UPPER"> (x)'),
    ("float[2,3,4,5,6] x", "y = AveragePool <kernel_shape = [2,3,2], strides = [1,2,2]> (x)"),
    (IMAGE, "y = LpPool <kernel_shape = [3,2], strides = [2,2], pads = [1,0,1,0]> (x)"),
    (IMAGE, "y = LpPool <kernel_shape = [2,2], p = 3> (x)"),
    *(
        (shape, f"y = {kind} (x)")
        for kind in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
        for shape in (IMAGE, "float[2,3,5] x")
    ),
    *(
        (
            shape,
            f"v, i = MaxPool <kernel_shape = {kernel}, strides = {strides}{form}> (x) "
            "y = Cast <to = 1> (i)",
        )
        for shape, kernel, strides, form in (
            (IMAGE, "[2,2]", "[2,2]", ""),
            (IMAGE, "[3,3]", "[2,2]", ", pads = [1,1,1,1], ceil_mode = 1"),
            (IMAGE, "[3,2]", "[2,2]", ", pads = [0,1,2,0]"),
            ("float[2,3,9] x", "[3]", "[2]", ", dilations = [2]"),
            ("float[2,3,4,5,6] x", "[2,2,2]", "[2,2,2]", ", pads = [0,0,0,0,1,0]"),
        )
    ),
    (
        "float[2,3,4,6] x",
        "v, i = MaxPool <kernel_shape = [2,2], strides = [2,2]> (x) "
        "y = MaxUnpool <kernel_shape = [2,2], strides = [2,2]> (v, i)",
    ),
    # reductions
    *(
        (f"{IMAGE}", f"y = Reduce{kind} <keepdims = {keep}> (x)")
        for kind in ("Sum", "SumSquare", "L1", "L2", "Mean", "Max", "Min", "Prod", "LogSumExp")
        for keep in (0, 1)
    ),
    *(
        (f"{IMAGE} | int64[2] a = {{-1, 1}}", f"y = Reduce{kind} <keepdims = {keep}> (x, a)")
        for kind in ("Sum", "SumSquare", "L1", "L2", "Mean", "Max", "Min", "Prod", "LogSumExp")
        for keep in (0, 1)
    ),
    (f"{IMAGE} | int64[1] a = {{2}}", "t = Exp (x) y = ReduceLogSum (t, a)"),
    (IMAGE, "y = ReduceMean <noop_with_empty_axes = 1> (x)"),
    # elementwise, one operand
    *(
        (IMAGE, f"y = {kind} (x)")
        for kind in [
            "Abs",
            "Asinh",
            "Atan",
            "Celu",
            "Ceil",
            "Cos",
            "Cosh",
            "Elu",
            "Erf",
            "Exp",
            "Floor",
            "Gelu",
            "HardSigmoid",
            "HardSwish",
            "Identity",
            "LeakyRelu",
            "Mish",
            "Neg",
            "Reciprocal",
            "Relu",
            "Round",
            "Selu",
            "Shrink",
            "Sigmoid",
            "Sign",
            "Sin",
            "Sinh",
            "Softplus",
            "Softsign",
            "Tan",
            "Tanh",
            "ThresholdedRelu",
        ]
    ),
    *((IMAGE, f"t = Tanh (x) y = {kind} (t)") for kind in ("Acos", "Asin", "Atanh")),
    *((IMAGE, f"t = Exp (x) y = {kind} (t)") for kind in ("Log", "Sqrt")),
    (IMAGE, "t = Cosh (x) y = Acosh (t)"),
    (IMAGE, 'y = Gelu <approximate = "tanh"> (x)'),
    (IMAGE, "y = Elu <alpha = 0.3> (x)"),
    (IMAGE, "y = Celu <alpha = 0.3> (x)"),
    (IMAGE, "y = Selu <alpha = 0.3, gamma = 2.0> (x)"),
    (IMAGE, "y = LeakyRelu <alpha = 0.3> (x)"),
    (IMAGE, "y = HardSigmoid <alpha = 0.16666667, beta = 0.5> (x)"),
    (IMAGE, "y = Shrink <lambd = 0.4, bias = 0.4> (x)"),
    (IMAGE, "y = Shrink <lambd = 0.4, bias = 0.3> (x)"),
    (IMAGE, "y = ThresholdedRelu <alpha = 0.2> (x)"),
    (IMAGE, "t = Less (x, x) y = Not (t)"),
    (f"{IMAGE}, float z", "t = Sub (z, z) u = Div (x, t) y = IsInf <detect_negative = 0> (u)"),
    (f"{IMAGE}, float z", "t = Sub (z, z) u = Div (t, t) y = IsNaN (u)"),
    (IMAGE, "y = Cast <to = 7> (x)"),
    ("float[2,3] x, int64[2,3] z", "y = CastLike (z, x)"),
    ("float[2,3] x | float r = {0.3}", "y = Dropout (x, r)"),
    ("float[2,3] x", "y = Dropout (x)"),
    ("float[2,3] x | float l = {-0.5}, float h = {0.25}", "y = Clip (x, l, h)"),
    ("float[2,3] x | float l = {0.0}, float h = {6.0}", "y = Clip (x, l, h)"),
    ("float[2,3] x | float h = {0.25}", "y = Clip (x, , h)"),
    # elementwise, several operands
    *(
        (f"{IMAGE}, float[3,1,1] w", f"y = {kind} (x, w)")
        for kind in ("Add", "Sub", "Mul", "Div", "PRelu", "Max", "Min", "Sum", "Mean")
    ),
    *(
        ("float[2,3] x, float[2,3] z", f"y = {kind} (x, z)")
        for kind in (
            [
                "Add",
                "Sub",
                "Mul",
                "Div",
                "Equal",
                "Greater",
                "GreaterOrEqual",
                "Less",
                "LessOrEqual",
                "Max",
                "Min",
                "Sum",
                "Mean",
            ]
        )
    ),
    *(("float[2,3] x | float c = {0.3}", f"y = {kind} (c, x)") for kind in ("Add", "Sub", "Div")),
    ("float[2,3] x | float e = {3.0}", "y = Pow (x, e)"),
    ("float[2,3] x, float[3] e", "t = Exp (x) y = Pow (t, e)"),
    ("float[2,3] x, float[3] w, float[2,1] v", "y = Sum (x, w, v)"),
    ("float[2,3] x, float[3] w, float[2,1] v", "y = Max (x, w, v)"),
    ("float[2,3] x, float[3] w", "y = Mod <fmod = 1> (x, w)"),
    ("int64[2,3] x | int64[3] c = {2, -3, 4}", "y = Mod (x, c)"),
    ("int64[2,3] x | int64[3] c = {2, -3, 4}", "t = Sub (x, c) y = Div (t, c)"),
    ("uint8[2,3] x | uint8[3] c = {1, 2, 3}", 'y = BitShift <direction = "LEFT"> (x, c)'),
    ("uint8[2,3] x | uint8[3] c = {1, 0, 3}", 'y = BitShift <direction = "RIGHT"> (c, x)'),
    *(
        ("int32[2,3] x | int32[3] c = {1, 2, 7}", f"y = Bitwise{kind} (c, x)")
        for kind in ("And", "Or", "Xor")
    ),
    *(("bool[2,3] x, bool[2,3] z", f"y = {kind} (x, z)") for kind in ("And", "Or", "Xor")),
    ("bool[2,3] x, float[2,3] z, float[3] w", "y = Where (x, z, w)"),
    ("bool[2,3] x, float[2,3] z | float c = {-1.0}", "y = Where (x, z, c)"),
    ("bool[2,3] x | float c = {-1.0}, float d = {2.0}", "y = Where (x, c, d)"),
    # movements
    (IMAGE, "y = Transpose <perm = [0,2,3,1]> (x)"),
    (IMAGE, "y = Transpose (x)"),
    (f"{IMAGE}, float[2,4,7,8] z", "y = Concat <axis = 1> (x, z)"),
    ("float[2,7] x | int64[3] s = {2, 4, 1}", "a, b, y = Split <axis = 1> (x, s)"),
    ("float[2,6] x", "a, y = Split <axis = -1, num_outputs = 2> (x)"),
    (
        "float[2,7,5] x | int64[2] s = {1, -3}, int64[2] e = {6, 9}, int64[2] a = {1, 2}",
        "y = Slice (x, s, e, a)",
    ),
    (
        "float[2,7] x | int64[1] s = {-1}, int64[1] e = {-9223372036854775807}, "
        "int64[1] a = {1}, int64[1] t = {-2}",
        "y = Slice (x, s, e, a, t)",
    ),
    (
        "float[2,7] x | int64[1] s = {1}, int64[1] e = {7}, int64[1] a = {1}, int64[1] t = {3}",
        "y = Slice (x, s, e, a, t)",
    ),
    ("float[2,7] x | int64[3] i = {3, -1, 0}", "y = Gather <axis = 1> (x, i)"),
    ("float[2,7] x | int64 i = {3}", "y = Gather <axis = 1> (x, i)"),
    ("float[2,7] x | int64[2,2] i = {3, 1, 0, 6}", "y = Gather <axis = 1> (x, i)"),
    ("int64[2,3] x, float[5,4] w", "y = Gather (w, x)"),
    ("float[2,3] x | int64[4] i = {0, 2, 1, -1}", "t = Gather <axis = 1> (x, i) y = Relu (t)"),
    (f"{IMAGE} | int64[8] p = {{0,0,1,2,0,1,0,2}}, float v = {{0.5}}", "y = Pad (x, p, v)"),
    (f"{IMAGE} | int64[8] p = {{0,1,-1,0,0,0,0,-2}}", "y = Pad (x, p)"),
    (f"{IMAGE} | int64[2] p = {{1,2}}, int64[1] a = {{-1}}", "y = Pad (x, p, , a)"),
    *(
        (f"{IMAGE} | int64[8] p = {{0,0,1,2,0,0,3,2}}", f'y = Pad <mode = "{mode}"> (x, p)')
        for mode in ("reflect", "edge", "wrap")
    ),
    *(
        ("float[2,5] x | int64[4] p = {0,1,0,2}", f'y = Pad <mode = "{mode}"> (x, p)')
        for mode in ("reflect", "edge", "wrap")
    ),
    ("float[2,1,3] x | int64[3] s = {1,4,3}", "y = Expand (x, s)"),
    ("float[2,1] x | int64[3] s = {3,1,4}", "y = Expand (x, s)"),
    ("float[2,1,3,1] x | int64[2] a = {1,-1}", "y = Squeeze (x, a)"),
    ("float[2,3] x | int64[2] a = {1,-1}", "y = Unsqueeze (x, a)"),
    ("float[2,3,4] x | int64[3] s = {0,-1,2}", "y = Reshape (x, s)"),
    ("float[2,3,4] x | int64[3] s = {2,4,3}", "y = Reshape (x, s)"),
    ("float[2,3,4] x | int64[2] s = {0,12}", "y = Reshape (x, s)"),
    (IMAGE, "y = Flatten (x)"),
    (IMAGE, "y = Flatten <axis = 2> (x)"),
    (IMAGE, "y = Flatten <axis = -1> (x)"),
    ("float[2,8,3,4] x", "y = DepthToSpace <blocksize = 2> (x)"),
    ("float[2,8,3,4] x", 'y = DepthToSpace <blocksize = 2, mode = "CRD"> (x)'),
    ("float[2,3,4,6] x", "y = SpaceToDepth <blocksize = 2> (x)"),
    ("float[2,3] x | int64[2] r = {1,3}", "y = Tile (x, r)"),
    # reading and writing at indices
    ("float[2,7] x | int64[2,3] i = {3,-1,0,2,2,5}", "y = GatherElements <axis = 1> (x, i)"),
    ("float[4,3] x, int64[2,3] z", "y = GatherElements (x, z)"),
    ("float[2,3,4] x, int64[2,3,2] z", "y = GatherND (x, z)"),
    ("float[2,3,4] x | int64[2,1,1] i = {2,-1}", "y = GatherND <batch_dims = 1> (x, i)"),
    (
        "float[4,3] x, float[2,3] z | int64[2,1] i = {3,1}",
        "y = ScatterND (x, i, z)",
    ),
    (
        "float[4,3] x, float[2] z | int64[2,2] i = {3,1,-1,1}",
        'y = ScatterND <reduction = "add"> (x, i, z)',
    ),
    (
        "float[2,5] x, float[2,2] z | int64[2,2] i = {3,-1,0,2}",
        "y = ScatterElements <axis = 1> (x, i, z)",
    ),
    *(
        (
            "float[2,5] x, float[1,3] z | int64[1,3] i = {3,-1,3}",
            f'y = ScatterElements <axis = -1, reduction = "{kind}"> (x, i, z)',
        )
        for kind in ("add", "mul", "max", "min")
    ),
    # choosing, ranking, accumulating
    ("float[2,3,5] x | int64[1] k = {3}", "y, i = TopK <axis = 1> (x, k)"),
    ("float[2,3,5] x | int64[1] k = {2}", "v, y = TopK <largest = 0> (x, k)"),
    *(
        ("float[2,9,40] x | int64[1] k = {30}", f"e = Round (x)  v, y = TopK <{how}> (e, k)")
        for how in ("largest = 1", "largest = 0")  # many are equal
    ),
    *(
        (IMAGE, f"y = {kind} {how} (x)")
        for kind in ("ArgMax", "ArgMin")
        for how in ("", "<axis = -1, keepdims = 0>", "<axis = 1, select_last_index = 1>")
    ),
    *(
        (f"{IMAGE} | int64 a = {{-2}}", f"y = CumSum {how} (x, a)")
        for how in ("", "<exclusive = 1>", "<reverse = 1>", "<exclusive = 1, reverse = 1>")
    ),
    *(
        (
            "int64[2,3] x | int64 d = {4}, float[2] v = {0.5, 2.0}, int64 m = {-3}",
            f"t = Add (x, m) y = OneHot <axis = {axis}> (t, d, v)",
        )
        for axis in (-1, 0, 1)
    ),
    ("float[2,4,3] x", "y = Trilu (x)"),
    ("float[2,4,3] x | int64 k = {-1}", "y = Trilu <upper = 0> (x, k)"),
    ("float[4,2,3] x | int64[2] n = {3, 1}", "y = ReverseSequence (x, n)"),
    (
        "float[2,4,3] x | int64[2] n = {3, 4}",
        "y = ReverseSequence <batch_axis = 0, time_axis = 1> (x, n)",
    ),
    ("float[2,3,3] x", "y = Det (x)"),
    ("float[3,4] x", "y = EyeLike <k = 1> (x)"),
    ("float[3,4] x", "y = EyeLike <dtype = 6> (x)"),
    ("float[2,8,3,1] x | int64 a = {1}", "y = DFT (x, , a)"),
    ("float[2,8,3,1] x | int64 a = {-3}, int64 n = {6}", "y = DFT <onesided = 1> (x, n, a)"),
    ("float[2,3,8,2] x", "y = DFT <inverse = 1> (x)"),
    *(
        (f"float[2,5,3,2] x | int64 a = {{{axis}}}{length}", f"y = DFT {how} (x, {operands})")
        for how in ("<inverse = 1, onesided = 1>",)
        for axis, length, operands in (
            (1, "", ", a"),
            (-3, ", int64 n = {8}", "n, a"),
            (1, ", int64 n = {9}", "n, a"),
            (1, ", int64 n = {6}", "n, a"),
            (2, ", int64 n = {5}", "n, a"),
        )
    ),
    (
        "float[2,16,1] x | int64 s = {4}, float[8] w = {1,2,3,4,4,3,2,1}",
        "y = STFT (x, s, w)",
    ),
    ("int32[2,3] x", "y = BitwiseNot (x)"),
    # sampling
    *(
        (
            f"{IMAGE}, float[2,4,5,2] z",
            f'y = GridSample <mode = "{mode}", padding_mode = "{padding}", '
            f"align_corners = {aligned}> (x, z)",
        )
        for mode in ("linear", "nearest", "cubic")
        for padding in ("zeros", "border", "reflection")
        for aligned in (0, 1)
    ),
    *(
        ("float[2,2,3] x | int64[4] s = {2,5,3,4}", f"y = AffineGrid <align_corners = {a}> (x, s)")
        for a in (0, 1)
    ),
    (
        "float[2,12,4] x | int64[2] s = {5,5}, int64[2] k = {2,2}",
        "y = Col2Im <dilations = [2,2], strides = [2,2]> (x, s, k)",
    ),
    (
        "float[2,12,15] x | int64[2] s = {4,5}, int64[2] k = {2,3}",
        "y = Col2Im <pads = [1,0,1,0]> (x, s, k)",
    ),
    (
        "float[1,2,1,2] x | int64[1,2,1,2] i = {5, 2, 9, 14}",
        "y = MaxUnpool <kernel_shape = [2,2], strides = [2,2]> (x, i)",
    ),
    (
        "float[2,4,7] x | int64[3] s = {2, 7, 3}",
        "y = CenterCropPad (x, s)",
    ),
    (
        "float[2,4,7] x | int64[2] s = {4, 9}",
        "y = CenterCropPad <axes = [2, 1]> (x, s)",
    ),
    *(
        (
            f"{IMAGE}, float[3,4] z | int64[3] k = {{0,1,1}}, float h = {{6.0}}",
            "r = Mul (z, h) y = RoiAlign <output_height = 2, output_width = 3, "
            f"spatial_scale = 0.5, sampling_ratio = {ratio}, "
            f'coordinate_transformation_mode = "{where}"> (x, r, k)',
        )
        for ratio in (0, 2)
        for where in ("half_pixel", "output_half_pixel")
    ),
    (
        f"{IMAGE}, float[2,4] z | int64[4] p = {{0,1,0,0}}, float n = {{1.0}}, float h = {{6.0}}",
        "s = Mul (z, h) r = Pad (s, p, n) y = MaxRoiPool <pooled_shape = [2,3]> (x, r)",
    ),
    (
        "float[2,4,5,6] x, float[6,2,3,3] w, float[2,36,5,6] z, float[6] b, float[2,18,5,6] m",
        "y = DeformConv <pads = [1,1,1,1], group = 2, offset_group = 2> (x, w, z, b, m)",
    ),
    (
        "float[2,4,5,6] x, float[3,4,2,2] w, float[2,8,3,3] z",
        "y = DeformConv <pads = [0,1,1,0], strides = [2,2]> (x, w, z)",
    ),
    # quantized
    *(
        (
            f"float[2,3,4] x | float s = {{0.07}}, {kind} o = {{{zero}}}",
            "y = QuantizeLinear (x, s, o)",
        )
        for kind, zero in (("uint8", 120), ("int8", -3))
    ),
    ("float[2,3,4] x | float s = {0.01}", "y = QuantizeLinear (x, s)"),
    (
        "float[2,3,4] x | float[3] s = {0.07, 0.02, 0.03}, uint8[3] o = {9, 120, 200}",
        "y = QuantizeLinear (x, s, o)",
    ),
    (
        "int8[2,3] x | float[2] s = {0.07, 0.02}, int8[2] o = {3, -2}",
        "y = DequantizeLinear <axis = 0> (x, s, o)",
    ),
    ("uint8[2,3] x | float[1] s = {0.07}", "y = DequantizeLinear (x, s)"),
    *(
        ("float[2,3,4] x", f"{results} = DynamicQuantizeLinear (x)")
        for results in ("y, s, o", "q, y, o", "q, s, y")
    ),
    (
        "uint8[1,3,4,5] x | float s = {0.03}, uint8 o = {1}, int8[2,3,1,2] w = "
        "{1,2,-3,4,5,6,-7,8,9,10,-11,12}, float[2] t = {0.313, 0.217}, int8[2] p = {0, 0}, "
        "uint8 q = {100}, int32[2] b = {50, -60}",
        "y = QLinearConv <pads = [0,1,0,0]> (x, s, o, w, t, p, s, q, b)",
    ),
    (
        "uint8[1,2,4] x | float s = {0.03}, uint8 o = {1}, int8[4,1,2] w = {1,2,-3,4,5,6,-7,8}, "
        "float t = {0.3}, int8 p = {0}",
        "y = QLinearConv <group = 2, strides = [2]> (x, s, o, w, t, p, s, o)",
    ),
    (
        "uint8[1,2,4,4] x | uint8 o = {1}, uint8[2,2,1,1] w = {1,2,30,4}, uint8 p = {3}",
        "y = ConvInteger <pads = [1,1,1,1]> (x, w, o, p)",
    ),
    ("uint8[1,2,4] x | uint8[2,2,1] w = {1,2,30,4}", "y = ConvInteger (x, w)"),
    (
        "uint8[2,3] x | uint8 o = {1}, int8[3,2] w = {1,-2,3,-4,5,6}, int8[2] p = {3, -1}",
        "y = MatMulInteger (x, w, o, p)",
    ),
    ("uint8[2,3] x, uint8[3,2] z", "y = MatMulInteger (x, z)"),
    (
        "uint8[2,3] x | float s = {0.03}, uint8 o = {1}, int8[3,2] w = {1,-2,3,-4,5,6}, "
        "float[2] t = {0.3, 0.2}, int8[2] p = {0, 0}, uint8 q = {100}",
        "y = QLinearMatMul (x, s, o, w, t, p, s, q)",
    ),
    # resizes
    *(
        (
            f"{IMAGE} | float[4] s = {{1, 1, {scale}, {scale}}}",
            f'y = Resize <mode = "nearest", coordinate_transformation_mode = "{where}", '
            f'nearest_mode = "{rounding}"> (x, , s)',
        )
        for where in ("half_pixel", "asymmetric", "align_corners", "half_pixel_symmetric")
        for rounding in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
        for scale in ("2.0", "0.7")
    ),
    *(
        (
            f"{IMAGE} | int64[4] s = {{2, 3, {size}}}",
            f'y = Resize <mode = "{mode}", coordinate_transformation_mode = "{where}"> (x, , , s)',
        )
        for where in ("half_pixel", "pytorch_half_pixel", "align_corners")
        for mode in ("linear", "cubic")
        for size in ("14, 16", "5, 13")
    ),
    (f"{IMAGE} | int64[2] s = {{9, 4}}", "y = Resize <axes = [2, 3]> (x, , , s)"),
    ("float[2,3,7] x | float[3] s = {1, 1, 1.7}", 'y = Resize <mode = "linear"> (x, , s)'),
]

OLDER_CASES = [
    (17, "float[2,3,8,1] x", "y = DFT <axis = 2> (x)"),
    (17, "float[2,5,3,2] x", "y = DFT <inverse = 1, onesided = 1> (x)"),
    (12, "float[2,3,4] x", "y = Softmax (x)"),
    (12, "float[2,3,4] x", "y = LogSoftmax <axis = -1> (x)"),
    (11, "float[2,3,4] x", "y = Hardmax <axis = 0> (x)"),
    (11, "float[2,3,4] x", "y = Dropout <ratio = 0.25> (x)"),
    (11, "float[2,1,3,1] x", "y = Squeeze <axes = [1,-1]> (x)"),
    (11, "float[2,3] x", "y = Unsqueeze <axes = [1,-1]> (x)"),
    (11, "float[2,7] x", "a, y = Split <axis = 1, split = [3,4]> (x)"),
    (11, "float[2,3,4] x", "y = ReduceSum <axes = [1], keepdims = 0> (x)"),
    (17, "float[2,3,4] x", "y = ReduceMean <axes = [-1]> (x)"),
    (
        18,
        "float[2,6,4] x, float[3] s, float[3] b",
        "y = GroupNormalization <num_groups = 3> (x, s, b)",
    ),
]

QKV = "float[2,4,5,6] x, float[2,4,7,6] k, float[2,4,7,3] v"
_FLAT = "float[2,5,24] x, float[2,7,12] k, float[2,7,6] v"
_SQUARE = "float[2,4,5,6] x, float[2,2,5,6] k, float[2,2,5,3] v"
_PAST = "float[2,2,3,6] pk, float[2,2,3,3] pv"
_STATES = "float[2,5,8] x, float[2,5,8] k, float[2,5,6] v"
_READ = "e = ReduceSum <keepdims = 0> (s) y = Add (a, e)"
NEWER_CASES = [
    (23, QKV, "y = Attention (x, k, v)"),
    (23, _SQUARE, "y = Attention <is_causal = 1, scale = 0.3> (x, k, v)"),
    (23, _SQUARE, "y = Attention <is_causal = 1, softcap = 0.7> (x, k, v)"),
    (23, f"{_SQUARE}, float[4,5,5] m", "y = Attention <softcap = 0.7> (x, k, v, m)"),
    (23, f"{_SQUARE}, bool[5,5] z", "y = Attention <softcap = 0.7> (x, k, v, z)"),
    (23, _FLAT, "y = Attention <q_num_heads = 4, kv_num_heads = 2> (x, k, v)"),
    (23, _FLAT, "y = Attention <q_num_heads = 4, kv_num_heads = 2, softcap = 2.0> (x, k, v)"),
    (23, f"{QKV}, float[5,7] m", "y = Attention (x, k, v, m)"),
    (23, f"{QKV}, bool[2,1,5,7] z", "y = Attention (x, k, v, z)"),
    (23, f"{_SQUARE}, float[2,1,5,5] m", "y = Attention <is_causal = 1> (x, k, v, m)"),
    (23, f"{_SQUARE}, bool[5,5] z", "y = Attention <is_causal = 1> (x, k, v, z)"),
    *(
        (
            23,
            f"{_SQUARE}, {_PAST}",
            f"a, b, c = Attention {causal} (x, k, v, , pk, pv) d = ReduceSum <keepdims = 0> (b) "
            "e = ReduceSum <keepdims = 0> (c) f = Add (d, e) y = Add (a, f)",
        )
        for causal in ("", "<is_causal = 1>")
    ),
    *(
        (23, given, f"y = RotaryEmbedding <interleaved = {kind}> {nodes}")
        for kind in (0, 1)
        for given, nodes in (
            ("float[2,3,5,4] x, float[2,5,2] c, float[2,5,2] s", "(x, c, s)"),
            ("float[2,3,5,4] x, int64[2,5] z, float[7,2] c, float[7,2] s", "(x, c, s, z)"),
        )
    ),
    (
        23,
        "float[2,5,12] x, float[2,5,2] c, float[2,5,2] s",
        "y = RotaryEmbedding <num_heads = 3> (x, c, s)",
    ),
    (
        23,
        "float[2,3,5,8] x, float[2,5,2] c, float[2,5,2] s",
        "y = RotaryEmbedding <rotary_embedding_dim = 4> (x, c, s)",
    ),
    (23, "float[2,3,6] x, float[6] s", "y = RMSNormalization (x, s)"),
    (23, "float[2,3,6] x, float[3,6] s", "y = RMSNormalization <axis = 1, epsilon = 0.01> (x, s)"),
    (23, "float[2,3,6] x, float[1] s", "y = RMSNormalization (x, s)"),
    *(
        (26, f"{IMAGE} | int64 a = {{1}}", f"y = CumProd {how} (x, a)")
        for how in ("", "<exclusive = 1, reverse = 1>")
    ),
    *(
        (
            24,
            f"float[2,3,{length},4] x, float[2,3,2,4] z | int64[2] k = {{{places}}}",
            f'y = TensorScatter <mode = "{mode}"> (x, z, k)',
        )
        for length, places, mode in ((6, "3,0", "linear"), (5, "4,2", "circular"))
    ),
    (24, "float[2,6,4] x, float[2,2,4] z", "y = TensorScatter <axis = 1> (x, z)"),
    (24, IMAGE, "y = Swish (x)"),
    (24, IMAGE, "y = Swish <alpha = 0.7> (x)"),
    *(
        (27, f"{_STATES}{more}", f"a, s = LinearAttention <{form}> ({operands}) {_READ}")
        for more, form, operands in (
            ("", 'q_num_heads = 2, kv_num_heads = 2, update_rule = "linear"', "x, k, v"),
            (
                ", float[2,5,2] d",
                'q_num_heads = 2, kv_num_heads = 2, scale = 0.3, update_rule = "gated"',
                "x, k, v, , d",
            ),
            (
                ", float[2,2,4,3] p, float[2,5,1] b",
                'q_num_heads = 2, kv_num_heads = 2, update_rule = "delta"',
                "x, k, v, p, , b",
            ),
            (
                ", float[2,2,4,3] p, float[2,5,8] d, float[2,5,2] b",
                "q_num_heads = 2, kv_num_heads = 2",
                "x, k, v, p, d, b",
            ),
        )
    ),
    (
        27,
        "float[2,5,16] x, float[2,5,8] k, float[2,5,6] v, float[2,5,2] d, float[2,5,2] b",
        f"a, s = LinearAttention <q_num_heads = 4, kv_num_heads = 2> (x, k, v, , d, b) {_READ}",
    ),
    *(
        (
            27,
            "float[2,6,5] x, float[6,1,3] w, float[6] b, float[2,6,2] p",
            f'a, s = CausalConvWithState <activation = "{kind}"> ({operands}) {_READ}',
        )
        for kind, operands in (("none", "x, w"), ("silu", "x, w, b"), ("swish", "x, w, b, p"))
    ),
]
