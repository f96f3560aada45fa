"""Operators of ONNX Runtime itself, each alone in a model: see ``CONTRIB_CASES``."""

_STORED = (
    "uint8[2,3,4,6] x, uint8[2,3,4,6] z",
    "float s = {0.03}, uint8 o = {120}, float t = {0.0217}, uint8 p = {90}, float u = {0.05}, "
    "float r = {0.00390625}, uint8 n = {0}",
)
_TOKENS = "float[2,5,6] x"


def numbers(count: int, low: int = 0) -> str:
    """So many of the whole numbers that a byte holds, in braces."""
    return f"{{{','.join(str(low + 97 * k % 256) for k in range(count))}}}"


_KERNEL = (
    f"int8[6,4] w = {numbers(24, -128)}, float t = {{0.01}}, int8 z = {{5}}, "
    "float[4] u = {0.01, 0.02, 0.03, 0.04}, int8[4] v = {1, -2, 3, -4}, uint8 o = {120}"
)
CONTRIB_CASES = [  # inputs, result, constants, operator, its form
    ("float[2,6] x", "float[2,6]", "", "Gelu", "(x)"),
    ("float[2,6] x", "float[2,6]", "", "FastGelu", "(x)"),
    ("float[2,6] x, float[6] w", "float[2,6]", "", "FastGelu", "(x, w)"),
    ("float[2,6] x, float[6] w", "float[2,6]", "", "BiasGelu", "(x, w)"),
    ("float[2,6] x", "float[2,6]", "", "QuickGelu", "<alpha = 1.5> (x)"),
    *(
        (
            "float[2,4,5,6] x, float[6,2,3,3] w, float[6] b, float[2,6,5,6] z",
            "float[2,6,5,6]",
            "",
            "FusedConv",
            f"<pads = [1,1,1,1], group = 2, {activation}> {operands}",
        )
        for activation, operands in (
            ('activation = "Relu"', "(x, w, b, z)"),
            ('activation = "Tanh"', "(x, w, b)"),
            ('activation = "Sigmoid"', "(x, w)"),
            ('activation = "LeakyRelu", activation_params = [0.3]', "(x, w, b)"),
            ('activation = "Clip", activation_params = [-0.3, 0.4]', "(x, w, b)"),
            ('activation = "HardSigmoid", activation_params = [0.3, 0.4]', "(x, w, b)"),
        )
    ),
    *(
        (
            "float[4,3] x, float[6,3] w, float[6] b",
            "float[4,6]",
            "",
            "FusedGemm",
            f"<transB = 1, {activation}> (x, w, b)",
        )
        for activation in (
            'activation = "Relu", alpha = 0.5',
            'activation = "LeakyRelu", activation_alpha = 0.2',
        )
    ),
    (
        "float[2,5,3] x, float[2,5,4] w",
        "float[2,3,4]",
        "",
        "FusedMatMul",
        "<transA = 1, alpha = 0.25> (x, w)",
    ),
    (f"{_TOKENS}, float[2,5,3] z", "float[2,6,3]", "", "FusedMatMul", "<transA = 1> (x, z)"),
    (f"{_TOKENS}, float[4,6] w", "float[2,5,4]", "", "FusedMatMul", "<transB = 1> (x, w)"),
    *(
        (
            f"{_TOKENS}, float[2,5,6] z, float[6] g, float[6] h, float[6] k",
            "float[2,5,6]",
            "",
            kind,
            form,
        )
        for kind, forms in (
            ("SkipLayerNormalization", ("(x, z, g)", "(x, z, g, h)", "(x, z, g, h, k)")),
            ("SkipSimplifiedLayerNormalization", ("(x, z, g)", "(x, z, g, k)")),
        )
        for form in forms
    ),
    *(
        (
            f"{_TOKENS}, float[2,{keys},6] k, float[2,{keys},9] v, float[1,3,5,{keys}] m",
            "float[2,5,9]",
            "",
            "MultiHeadAttention",
            form,
        )
        for keys, form in (
            (7, "<num_heads = 3> (x, k, v)"),
            (7, "<num_heads = 3, scale = 0.3> (x, k, v, , , m)"),
            (5, "<num_heads = 3, unidirectional = 1> (x, k, v)"),
        )
    ),
    *(
        (
            f"{_TOKENS}, float[6,18] w, float[18] b, float[2,3,5,5] m",
            "float[2,5,6]",
            "",
            "Attention",
            form,
        )
        for form in (
            "<num_heads = 3> (x, w, b)",
            "<num_heads = 2, unidirectional = 1, scale = 0.4> (x, w, b)",
            "<num_heads = 3> (x, w, b, , , m)",
        )
    ),
    (
        f"{_TOKENS}, float[6,20] w, float[20] b",
        "float[2,5,8]",
        "",
        "Attention",
        "<num_heads = 2, qkv_hidden_sizes = [6, 6, 8]> (x, w, b)",
    ),
    *(
        (
            f"{_TOKENS}, float[2,5,6] k, float[2,5,9] v, float[21] b, float[2,3,5,5] m",
            "float[2,5,9]",
            "int32[2,5] a = {1,1,1,1,0,1,1,0,0,0}",
            "MultiHeadAttention",
            f"<num_heads = 3> (x, k, v, b{more})",
        )
        for more in ("", ", a", ", a, m")
    ),
    (
        f"{_TOKENS}, float[2,3,7,2] k, float[2,3,7,2] v",
        "float[2,5,6]",
        "",
        "MultiHeadAttention",
        "<num_heads = 3> (x, k, v)",
    ),
    *(
        (
            "float[2,5,64] x, float[2,5,32] k, float[2,5,32] v",
            "float[2,5,64]",
            "int32[2] a = {4,4}, int32 t = {5}",
            "GroupQueryAttention",
            f"<num_heads = 4, kv_num_heads = 2{more}> (x, k, v, , , a, t)",
        )
        for more in ("", ", scale = 0.2")
    ),
    *(
        (
            f"float[2,5,24] x, float[9,{size}] c, float[9,{size}] s",
            "float[2,5,24]",
            f"int64[{shape}] i = {{{steps}}}",
            "RotaryEmbedding",
            f"<num_heads = 3{more}> (x, i, c, s)",
        )
        for size, shape, steps, more in (
            (4, "2,5", "0,1,2,3,4,1,2,3,4,5", ""),
            (4, "1", "2", ", interleaved = 1"),
            (2, "1", "0", ", rotary_embedding_dim = 4"),
        )
    ),
    (
        "float[2,3,5,8] x, float[9,4] c, float[9,4] s",
        "float[2,3,5,8]",
        "int64[1] i = {1}",
        "RotaryEmbedding",
        "(x, i, c, s)",
    ),
    *(
        (
            "int32[2,5] x, float[9,6] w, float[7,6] p, float[2,6] k, float[6] g, float[6] h",
            "float[2,5,6]",
            "int32[2,5] i = {0,1,2,3,4,1,2,3,4,5}",
            "EmbedLayerNormalization",
            f"<epsilon = 0.001> ({operands})",
        )
        for operands in ("x, x, w, p, k, g, h", "x, , w, p, , g, h", "x, , w, p, , g, h, , i")
    ),
    *(
        (
            f"float[2,3,4] x, {right} w",
            result,
            "",
            "FusedMatMul",
            f"<{form}> (x, w)",
        )
        for right, result, form in (
            ("float[3,4,5]", "float[3,2,5]", "transBatchA = 1"),
            ("float[3,2,5]", "float[3,4,5]", "transBatchA = 1, transA = 1"),
            ("float[4,2,5]", "float[2,3,5]", "transBatchB = 1"),
            ("float[5,2,4]", "float[2,3,5]", "transBatchB = 1, transB = 1"),
        )
    ),
    *(
        ("float[3,4] x", "float[3,4]", "", f"ai.onnx.ml.{kind}", f"<{form}> (x)")
        for kind, form in (
            ("Scaler", "offset = [0.1, 0.2, -0.3, 0.4], scale = [1.5, 2.0, 3.0, 0.5]"),
            ("Scaler", "offset = [0.5], scale = [2.0]"),
            ("Imputer", "imputed_value_floats = [0.1, 0.2, -0.3, 0.4]"),
            ("Imputer", "imputed_value_floats = [0.5], replaced_value_float = 1.0"),
        )
    ),
    *(
        (_STORED[0], "uint8[2,3,4,6]", _STORED[1], "QLinearSoftmax", f"<{form}> (x, s, o, r, n)")
        for form in ("axis = 1, opset = 13", "axis = 2, opset = 12")
    ),
    *(
        (_TOKENS + ", float[4] b", "float[2,5,4]", _KERNEL, "DynamicQuantizeMatMul", f"({form})")
        for form in ("x, w, t, z, b", "x, w, u, v")
    ),
    *(
        ("uint8[2,5,6] x, float[4] b", "float[2,5,4]", _KERNEL, "MatMulIntegerToFloat", f"({form})")
        for form in ("x, w, t, u, o, v, b", "x, w, t, t")
    ),
    *(
        (
            "int64[2,5] i, float[9,2] s",
            "float[2,5,32]",
            f"uint8[9,{4 * bits}] w = {numbers(36 * bits)}, "
            f"uint8[9,{bits // 4}] z = {numbers(9 * bits // 4)}",
            "GatherBlockQuantized",
            f"<bits = {bits}, block_size = 16, quantize_axis = 1> ({form})",
        )
        for bits, form in ((4, "w, i, s"), (4, "w, i, s, z"), (8, "w, i, s, z"))
    ),
    *(
        (
            f"float[{tokens},8] x, float[6,4] r, float[4,{12 * fused},8] w, float[4,8,12] v",
            f"float[{tokens},8]",
            "",
            "MoE",
            f"<k = 2, {how}> (x, r, w, , v)",
        )
        for tokens, fused, how in (
            ("6", 1, "normalize_routing_weights = 1"),
            ("2,3", 1, 'activation_type = "gelu"'),
            ("6", 2, 'activation_type = "swiglu", swiglu_fusion = 1'),
        )
    ),
    (
        "float[6,32] x, float[6,4] r, float[4,32] s, float[4,32] t",
        "float[6,32]",
        f"uint8[4,32,16] w = {numbers(2048)}, uint8[4,32,16] v = {numbers(2048)}",
        "QMoE",
        '<k = 2, activation_type = "silu", expert_weight_bits = 4, normalize_routing_weights = 1> '
        "(x, r, w, s, , v, t)",
    ),
    *(
        (
            f"float[2,5,{columns}] x, float[{4 * blocks}] s, float[4] b",
            "float[2,5,4]",
            f"uint8[4,{blocks},{2 * bits}] w = {numbers(8 * bits * blocks)}, "
            f"uint8[{4 * packed}] z = {numbers(4 * packed)}",
            "MatMulNBits",
            f"<K = {columns}, N = 4, bits = {bits}, block_size = 16> ({form})",
        )
        for columns, blocks, bits, packed, form in (
            (32, 2, 4, 1, "x, w, s"),
            (32, 2, 4, 1, "x, w, s, , , b"),
            (48, 3, 4, 2, "x, w, s, z"),
            (40, 3, 4, 2, "x, w, s, z"),
            (32, 2, 8, 2, "x, w, s, z"),
        )
    ),
    (
        "float[2,5,32] x, float[8] s",
        "float[2,5,4]",
        f"uint8[4,2,8] w = {numbers(64)}, "
        f"int32[32] g = {{{','.join(str(k * 7 % 3 % 2) for k in range(32))}}}",
        "MatMulNBits",  # with zero points: findings/onnxruntime-ignored-in-few-bits.sh
        "<K = 32, N = 4, bits = 4, block_size = 16> (x, w, s, , g)",
    ),
    (
        "uint8[2,5,6] x, float[18] h",
        "float[2,5,6]",
        "float s = {0.03}, uint8 o = {120}, float t = {0.02}, int8 u = {0}, int8[6,18] w = "
        f"{{{','.join(str(37 * k % 200 - 100) for k in range(108))}}}",
        "QAttention",
        "<num_heads = 3> (x, w, h, s, t, , o, u)",
    ),
    *(
        (_STORED[0], "uint8[2,3,4,6]", _STORED[1], kind, "(x, s, o, z, t, p, u, o)")
        for kind in ("QLinearAdd", "QLinearMul")
    ),
    (_STORED[0], "uint8[2,3,4,6]", _STORED[1], "QLinearSigmoid", "(x, s, o, t, p)"),
    (
        _STORED[0],
        "uint8[2,3,4,6]",
        _STORED[1],
        "QLinearLeakyRelu",
        "<alpha = 0.2> (x, s, o, u, p)",
    ),
    (
        _STORED[0],
        "uint8[2,3,2,3]",
        _STORED[1],
        "QLinearAveragePool",
        "<kernel_shape = [3,3], strides = [2,2], pads = [1,1,1,1]> (x, s, o, u, p)",
    ),
    (_STORED[0], "uint8[2,3,1,1]", _STORED[1], "QLinearGlobalAveragePool", "(x, s, o, t, p)"),
    (
        _STORED[0],
        "uint8[2,6,4,6]",
        _STORED[1],
        "QLinearConcat",
        "<axis = 1> (t, p, x, s, o, z, u, p)",
    ),
    *(
        (
            "uint8[4,3] x",
            f"{kind}[4,2]",
            "float s = {0.03}, uint8 o = {120}, int8[2,3] w = {50,-40,30,-20,10,60}, "
            "float[2] t = {0.02,0.013}, int8[2] v = {0,0}, int32[2] h = {700,-800}, "
            "float r = {0.1}, uint8 p = {90}",
            "QGemm",
            f"<transB = 1> ({operands})",
        )
        for kind, operands in (
            ("uint8", "x, s, o, w, t, v, h, r, p"),
            ("float", "x, s, o, w, t, v, h"),
        )
    ),
    ("float[2,5,6] x, float[6] w", "float[2,5,6]", "", "", "SimplifiedLayerNormalization (x, w)"),
    (
        "float[2,5,3] x, float[3] w, float[3] s",
        "float[2,5,3]",
        "",
        "LinearAttentionGate",
        "(x, w, s)",
    ),
    (
        "float[2,5,8] x, float[2,5,16] k, float[2,5,12] v",
        "float[2,5,12]",
        "",
        "LinearAttention",
        '<q_num_heads = 2, kv_num_heads = 4, update_rule = "linear"> (x, k, v)',
    ),
    (
        "float[2,5,6] x, float[6,1,3] w, float[6] b",
        "float[2,5,6]",
        "",
        "CausalConvWithState",
        '<channels_last = 1, dilation = 2, activation = "silu"> (x, w, b)',
    ),
]
