"""Ollama templates derived from chat templates, rendered by Go itself."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_recipe import SFT, write_small
from tiny import tiny_model_dir, tiny_tokenizer
from tokenizers import processors

from trainer.config.load import load_recipe
from trainer.data.template import TEMPLATES, ChatTemplate
from trainer.errors import ModelError
from trainer.export.go_template import default_system, varied_chats
from trainer.export.ollama import chat_format_of, modelfile
from trainer.planning.plan import Plan, make_plan

DATE = "2025-01-01"
GO = r"""
package main

import (
	"encoding/json"
	"os"
	"text/template"
)

type Message struct{ Role, Content string }
type Values struct {
	System   string
	Messages []*Message
}

// Renders each chat of the standard input, as Ollama does: system messages are also in .System.
func main() {
	var input struct {
		Template string
		Chats    [][]*Message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&input); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Parse(input.Template))
	texts := []string{}
	for _, chat := range input.Chats {
		values := Values{Messages: chat}
		for _, message := range chat {
			if message.Role == "system" {
				values.System = message.Content
			}
		}
		file, _ := os.CreateTemp("", "rendered")
		if err := parsed.Execute(file, values); err != nil {
			panic(err)
		}
		text, _ := os.ReadFile(file.Name())
		os.Remove(file.Name())
		texts = append(texts, string(text))
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
"""
TRIMMING = """\
{{- bos_token }}{%- for message in messages %}{{- '[' + message.role + ']' + message.content | trim + '[/]' }}\
{%- endfor %}{%- if add_generation_prompt %}{{- '[assistant]' }}{%- endif %}"""
DEFAULT_SYSTEM = """\
{%- if messages[0].role != 'system' %}{{- '<s>You are kind.</s>' }}{%- endif %}\
{%- for message in messages %}{{- '<s>' if message.role == 'system' else '<' + message.role + '>' }}\
{{- message.content + '</s>' }}{%- endfor %}{{- '<assistant>' if add_generation_prompt }}"""
LAST_ONLY = "{{ messages[-1].content }}{{ '>' if add_generation_prompt }}"
NUMBERED = "{% for m in messages %}{{ m.role }} {{ loop.index }}: {{ m.content }}\n{% endfor %}"
NO_SYSTEM = """\
{%- if messages[0].role == 'system' %}{{- raise_exception('no system messages') }}{%- endif %}\
{%- for message in messages %}{{- '{{' + message.role + ':' + message.content + '}}' }}{%- endfor %}\
{{- '{{assistant:' }}"""


@pytest.fixture(scope="module")
def go(tmp_path_factory) -> Path:
    if shutil.which("go") is None:
        pytest.skip("Go is not installed (golang-go)")
    root = tmp_path_factory.mktemp("go")
    (root / "render.go").write_text(GO)
    environment = {"HOME": str(root), "PATH": "/usr/local/bin:/usr/bin:/bin", "GO111MODULE": "off"}
    subprocess.run(["go", "build", "-o", "render", "render.go"], cwd=root, env=environment, check=True)
    return root / "render"


def tokenizer_with(template: str):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [*sorted(file.stem for file in TEMPLATES.glob("*.jinja")), TRIMMING, NO_SYSTEM])
def test_go_renders_what_jinja_renders(go, template):
    text = template if "{" in template else (TEMPLATES / f"{template}.jinja").read_text()
    tokenizer = tokenizer_with(text)
    chat_format = chat_format_of(tokenizer, DATE, {})
    chats = list(varied_chats(with_system=chat_format.system is not None))
    assert len(chats) == 20
    given = json.dumps({"Template": chat_format.go_template(), "Chats": chats})
    done = subprocess.run([go], input=given, capture_output=True, text=True, check=True)
    jinja = ChatTemplate(tokenizer, DATE)
    for chat, rendered in zip(chats, json.loads(done.stdout), strict=True):
        expected = jinja.prompt(chat, None, {})
        assert rendered == expected
        assert tokenizer(rendered)["input_ids"] == tokenizer(expected, add_special_tokens=False)["input_ids"]


def test_go_leaves_an_answer_open_that_is_to_be_continued(go):
    chat_format = chat_format_of(tokenizer_with(TRIMMING), DATE, {})
    chat = [{"role": "user", "content": "Say hello"}, {"role": "assistant", "content": "Hel"}]
    given = json.dumps({"Template": chat_format.go_template(), "Chats": [chat]})
    done = subprocess.run([go], input=given, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["<|im_start|>[user]Say hello[/][assistant]Hel"]


def test_a_first_token_that_the_tokenizer_adds_is_left_to_it():
    tokenizer = tokenizer_with(TRIMMING)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    chat_format = chat_format_of(tokenizer, DATE, {})
    assert chat_format.go_template().startswith("{{ if .System }}[system]")


def test_the_default_system_message_is_found():
    chat_format = chat_format_of(tokenizer_with(DEFAULT_SYSTEM), DATE, {})
    assert default_system(chat_format) == "You are kind."


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LAST_ONLY, "does not show a message of user as it is"),
        (NUMBERED, "the chat template is not a fixed text around each message"),
    ],
)
def test_a_template_that_does_not_decompose_is_refused(template, message):
    with pytest.raises(ModelError, match=message):
        chat_format_of(tokenizer_with(template), DATE, {})


def test_the_modelfile_has_template_system_message_and_stop_tokens(tmp_path):
    plan = sft_plan(tmp_path, {"data": {"system": "Answer in one word."}})
    text = modelfile(plan, "tiny-f16.gguf")
    lines = text.splitlines()
    assert lines[2] == "FROM ./tiny-f16.gguf"
    assert lines[3].startswith('TEMPLATE """{{ if .System }}<|im_start|>system')
    assert lines[-2:] == ['SYSTEM """Answer in one word."""', 'PARAMETER stop "<|im_end|>"']


def test_a_run_on_plain_text_has_no_modelfile(tmp_path):
    with pytest.raises(ModelError, match="trains without a chat template"):
        modelfile(sft_plan(tmp_path, {"data": {"format": "text"}}), "tiny-f16.gguf")


def sft_plan(root: Path, changes: dict[str, Any]) -> Plan:
    write_small(root)
    tiny_model_dir(root / "model")
    settings = yaml.safe_load(SFT)
    for name, value in changes.items():
        settings[name] = settings[name] | value
    settings["model"]["path"] = str(root / "model")
    for part in ("train", "eval"):
        settings["data"][part] = str(root / f"{part}.jsonl")
    (root / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return make_plan(load_recipe(root / "recipe.yaml", []))
