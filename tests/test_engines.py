"""Handed over: `transformers serve` on this machine writes what our model writes."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from kvcache_lib.checkpoint import save
from kvcache_lib.engines import commands, complete, complete_all
from kvcache_lib.fast import GPT_fast
from kvcache_lib.kept import kept_tokenizer, text_model

PROMPTS = ["The cache holds", "A token attends to", "Predict", "The keys and values of the"]
MISSING = [name for name in ("transformers", "fastapi", "uvicorn", "openai", "typer") if find_spec(name) is None]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.skipif(bool(MISSING), reason=f"transformers serve needs {', '.join(MISSING)}: pip install 'transformers[serving]'")
def test_transformers_serves_the_same_texts(tmp_path):
    model, tokenizer, folder, port = text_model(GPT_fast), kept_tokenizer(), tmp_path / "model", free_port()
    save(model, folder, tokenizer)
    program, *arguments = commands(folder, port, pages=64)["transformers"]
    log = (tmp_path / "log").open("w+")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([Path(sys.executable).parent / program, *arguments], env=environment, stdout=log, stderr=log)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < end, log.seek(0) or log.read()
                time.sleep(0.2)
        got = complete_all(url, str(folder), PROMPTS, max_tokens=20, timeout=120)
        with pytest.raises(ValueError, match="answered 4.*another"):
            complete(url, "another", PROMPTS[0], 20)
    finally:
        server.terminate()
        server.wait()
    ids = [torch.tensor(tokenizer.encode(prompt).ids) for prompt in PROMPTS]
    want = [model.generate_kv(one[None], 20)[0, len(one) :].tolist() for one in ids]
    assert got == [tokenizer.decode(tokens) for tokens in want]


def test_no_server_is_an_error_of_the_system():
    with pytest.raises(OSError):
        complete(f"http://127.0.0.1:{free_port()}", "model", "a", 1, timeout=5)
