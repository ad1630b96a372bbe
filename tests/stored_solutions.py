"The exercise of notebook 13: wrong solutions, as edits of a right one, with the words that name them; and right ones."

RIGHT = '''
def layer_weights(tensors, layer):
    start = f"transformer.h.{layer}."
    own = {name.removeprefix(start): z for name, z in tensors.items() if name.startswith(start)}
    if own:
        return {name: z.T if z.ndim == 2 else z for name, z in own.items()}

    def joined(*names):
        return torch.cat([tensors[f"model.layers.{layer}.{name}.weight"] for name in names])

    return {
        "ln_1.weight": joined("input_layernorm"),
        "attn.c_attn.weight": joined("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn.c_proj.weight": joined("self_attn.o_proj"),
        "ln_2.weight": joined("post_attention_layernorm"),
        "mlp.c_fc.weight": joined("mlp.gate_proj", "mlp.up_proj"),
        "mlp.c_proj.weight": joined("mlp.down_proj"),
    }
'''
QKV = 'joined("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")'
TURNED = "        return {name: z.T if z.ndim == 2 else z for name, z in own.items()}\n"


def edited(*pairs):
    source = RIGHT
    for old, new in pairs:
        assert source.count(old) == 1, (old, source)
        source = source.replace(old, new)
    return source


WRONG = {  # name: (what its message must hold, the source)
    "GPT-2 as it is stored": ("GPT-2 stores it as (in, out)", edited((TURNED, "        return own\n"))),
    "GPT-2, only what is not square": ("attn.c_proj.weight is still as it is stored: GPT-2", edited((TURNED, TURNED.replace("z.ndim == 2", "z.ndim == 2 and z.size(0) != z.size(1)")))),
    "Llama transposed": ("the parts of attn.c_attn.weight are transposed", edited(('weight"] for name in names])', 'weight"].T for name in names])'))),
    "the output of attention transposed": ("attn.c_proj.weight is transposed, and should not be: a Llama", edited(('joined("self_attn.o_proj")', 'joined("self_attn.o_proj").T'))),
    "keys first": ("joined as k_proj, q_proj, v_proj", edited((QKV, 'joined("self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj")'))),
    "side by side": ("side by side", edited(("for name in names])", "for name in names], dim=-1)"))),
    "row by row": ("row by row", edited((QKV, 'torch.stack([joined(f"self_attn.{z}_proj") for z in "qkv"], 1).flatten(0, 1)'))),
    "gate and up swapped": ("joined as up_proj, gate_proj", edited(('joined("mlp.gate_proj", "mlp.up_proj")', 'joined("mlp.up_proj", "mlp.gate_proj")'))),
    "the gate alone": ("is gate_proj alone", edited(('joined("mlp.gate_proj", "mlp.up_proj")', 'joined("mlp.gate_proj")'))),
    "norms swapped": ("ln_1.weight holds what belongs to ln_2.weight", edited(('joined("input_layernorm")', 'joined("post_attention_layernorm")'))),
    "down and o swapped": ("attn.c_proj.weight holds what belongs to mlp.c_proj.weight", edited(('joined("self_attn.o_proj")', 'joined("mlp.down_proj")'))),
    "always layer 0": ("is that of layer 0, not of layer 1", edited(("model.layers.{layer}", "model.layers.0"))),
    "no norm": ("ln_2.weight is missing", edited(('        "ln_2.weight": joined("post_attention_layernorm"),\n', ""))),
    "without the dot": ("1 is the beginning of 11", edited(('{layer}."\n', '{layer}"\n'), ("name.removeprefix(start): z", 'name.removeprefix(start).removeprefix("."): z'))),
    "with the layer's number": ("still say which layer", edited(("name.removeprefix(start): z", "name: z"))),
    "three matrices": ("have the checkpoint's names", edited((f'"attn.c_attn.weight": {QKV}', '**{f"attn.{z}_proj.weight": joined(f"self_attn.{z}_proj") for z in "qkv"}'))),
}  # fmt: skip

RIGHTS = {
    "as in the course": RIGHT,
    "line by line": '''
def layer_weights(tensors, layer):
    weights = {}
    if "transformer.wte.weight" in tensors:
        for part in ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            for kind in ("weight", "bias"):
                z = tensors[f"transformer.h.{layer}.{part}.{kind}"]
                weights[f"{part}.{kind}"] = z.t() if part[:2] != "ln" and kind == "weight" else z
        return weights
    get = lambda name: tensors["model.layers." + str(layer) + "." + name + ".weight"]
    weights["ln_1.weight"] = get("input_layernorm")
    weights["ln_2.weight"] = get("post_attention_layernorm")
    weights["attn.c_attn.weight"] = torch.vstack((get("self_attn.q_proj"), get("self_attn.k_proj"), get("self_attn.v_proj")))
    weights["attn.c_proj.weight"] = get("self_attn.o_proj")
    weights["mlp.c_fc.weight"] = torch.vstack((get("mlp.gate_proj"), get("mlp.up_proj")))
    weights["mlp.c_proj.weight"] = get("mlp.down_proj")
    return weights
''',
    "written into empty matrices": '''
def layer_weights(tensors, layer):
    if f"transformer.h.{layer}.ln_1.weight" in tensors:
        start = "transformer.h.%d." % layer
        return {n[len(start):]: (z.transpose(0, 1).contiguous() if z.dim() > 1 else z.clone()) for n, z in tensors.items() if n[: len(start)] == start}
    t = {n.split(".", 3)[3].removesuffix(".weight"): z for n, z in tensors.items() if n.split(".")[2:3] == [str(layer)]}
    q, k, v = (t[f"self_attn.{z}_proj"] for z in "qkv")
    joined = torch.empty(len(q) + len(k) + len(v), q.size(1))
    joined[: len(q)], joined[len(q) : len(q) + len(k)], joined[len(q) + len(k) :] = q, k, v
    return {"attn.c_attn.weight": joined, "attn.c_proj.weight": t["self_attn.o_proj"], "mlp.c_fc.weight": torch.cat((t["mlp.gate_proj"], t["mlp.up_proj"])),
            "mlp.c_proj.weight": t["mlp.down_proj"], "ln_1.weight": t["input_layernorm"], "ln_2.weight": t["post_attention_layernorm"]}
''',
    "a table of names": '''
def layer_weights(tensors, layer):
    table = {"input_layernorm": "ln_1", "self_attn.q_proj": "attn.c_attn", "self_attn.k_proj": "attn.c_attn", "self_attn.v_proj": "attn.c_attn",
             "self_attn.o_proj": "attn.c_proj", "post_attention_layernorm": "ln_2", "mlp.gate_proj": "mlp.c_fc", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}
    found = {}
    for theirs, ours in table.items():
        z = tensors.get(f"model.layers.{layer}.{theirs}.weight")
        if z is not None:
            found.setdefault(f"{ours}.weight", []).append(z)
    if not found:
        for ours in {*table.values()}:
            for kind in ("weight", "bias"):
                z = tensors[f"transformer.h.{layer}.{ours}.{kind}"]
                found[f"{ours}.{kind}"] = [z if z.ndim == 1 else z.mT]
    return {name: torch.cat(parts) for name, parts in found.items()}
''',
}
