"The exercise of notebook 10: wrong solutions with the words that name them, and right ones."

RIGHT = '''
def whole_characters(tokens, tokenizer, before=()):
    ids = list(before)
    start, stop = 0, len(ids)
    shown = tokenizer.decode(ids, skip_special_tokens=False)
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids[start:], skip_special_tokens=False)
        whole = text.rstrip("\\ufffd")
        if len(whole) > len(shown):
            yield whole[len(shown) :]
            shown = whole
            if whole == text:
                start, stop = stop, len(ids)
                shown = tokenizer.decode(ids[start:], skip_special_tokens=False)
'''


def edited(*pairs):
    source = RIGHT
    for old, new in pairs:
        assert source.count(old) == 1, (old, source)
        source = source.replace(old, new)
    return source


WRONG = {  # name: (what its message must hold, the source)
    "each token by itself": ("half characters are shown", "def whole_characters(tokens, tokenizer, before=()):\n    for token in tokens:\n        yield tokenizer.decode([token])"),
    "the half at the end": ("half a character is shown at the very end", RIGHT + '    yield "\\ufffd"\n'),
    "all again": ("what was shown is shown again", edited(("yield whole[len(shown) :]", "yield whole"), ("start, stop = stop, len(ids)", "pass"))),
    "without what stands before": ("a space is lost", edited(("list(before)", "[]"))),
    "all at once": ("all tokens are read before", edited(("in tokens:", "in list(tokens):"))),
    "the rest is forgotten": (
        "whole text is missing at the end", edited((".rstrip(\"\\ufffd\")", ""), ("if len(whole) > len(shown):", 'if len(whole) > len(shown) and not whole.endswith("\\ufffd"):')),
    ),
    "empty pieces": ("empty pieces", edited(("        if len(whole)", '        yield ""\n        if len(whole)'))),
    "an exception": ("your code stopped with ZeroDivisionError", "def whole_characters(tokens, tokenizer, before=()):\n    return 1 / 0"),
    "numbers": ("each piece must be a text", "def whole_characters(tokens, tokenizer, before=()):\n    yield from tokens"),
}  # fmt: skip

RIGHTS = {
    "as in the course": RIGHT,
    "all is decoded each time": '''
def whole_characters(tokens, tokenizer, before=()):
    ids = list(before)
    shown = len(tokenizer.decode(ids))
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids).rstrip("\\ufffd")
        if text[shown:]:
            yield text[shown:]
            shown = len(text)
''',
    "what waits, behind the last piece": '''
def whole_characters(tokens, tokenizer, before=()):
    last, wait, out = list(before), [], 0
    for token in tokens:
        wait = wait + [token]
        known = tokenizer.decode(last, skip_special_tokens=False)
        text = tokenizer.decode(last + wait, skip_special_tokens=False)[len(known):]
        new = text.rstrip("\\ufffd")[out:]
        if new:
            yield new
            out += len(new)
        if not text.endswith("\\ufffd"):
            last, wait, out = wait, [], 0
''',
    "an iterator": '''
class whole:
    def __init__(self, tokens, tokenizer, before):
        self.tokens, self.decode, self.ids = iter(tokens), tokenizer.decode, [*before]
        self.text = self.decode(self.ids)

    def __iter__(self):
        return self

    def __next__(self):
        while True:
            self.ids.append(next(self.tokens))
            text = self.decode(self.ids)
            while text.endswith("\\ufffd"):
                text = text[:-1]
            if len(text) > len(self.text):
                new, self.text = text[len(self.text) :], text
                return new


def whole_characters(tokens, tokenizer, before=()):
    return whole(tokens, tokenizer, before)
''',
}
