"""Chat templates: as transformers renders them, in a sandbox, refused with the reason."""

import json
import sys

import pytest

from ssh_deploy.errors import DependencyError, DeploymentError
from ssh_deploy.runtimes.chat import chat_prompt

SAID = [{"role": "user", "content": "Hi <there> 'é'"}]
TEMPLATES = {
    "tokens": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{{ eos_token }}{% endfor %}",
    "trimmed": "{% for m in messages %}\n  {% if m.role == 'user' %}\nU: {{ m.content }}\n  {% endif %}\n{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "break": "{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "generation": "{% generation %}{{ messages[0].content }}{% endgeneration %}",
    "prompt": "{% if add_generation_prompt %}<a>{% endif %}{% if tools %}no{% endif %}",
}


@pytest.fixture
def folder(tmp_path):
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def rendered(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    return chat_prompt(folder, SAID, file="chat_template.jinja")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_says_what_it_says_in_transformers(folder, name):
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "", "unk_token": ""}
    want, _ = render_jinja_template([SAID], chat_template=TEMPLATES[name], add_generation_prompt=True, **tokens)
    assert rendered(folder, TEMPLATES[name]) == want[0]


def test_a_template_in_the_tokenizers_config(folder):
    for value in ("{{ messages[0].content }}!", [{"name": "default", "template": "{{ messages[0].content }}!"}]):
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
        assert chat_prompt(folder, SAID, file=None) == SAID[0]["content"] + "!"


@pytest.mark.parametrize("config", [{}, {"chat_template": 3}, {"chat_template": [{"name": "rag", "template": "x"}]}])
def test_a_model_without_a_template(folder, config):
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DeploymentError, match="without a chat template"):
        chat_prompt(folder, SAID, file=None)


@pytest.mark.hostile
@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% set x = messages.append(1) %}",
        "{{ raise_exception('only the system may speak') }}",
        "{% for %}",
        "{{ 1 // 0 }}",
        "{% include '/etc/passwd' %}",
        "{{ messages['x']['y'] }}",
        "{{ range(10**9) | list }}",
    ],
)
def test_templates_that_fail_or_break_out(folder, template):
    with pytest.raises(DeploymentError, match="its chat template fails"):
        rendered(folder, template)


@pytest.mark.hostile
def test_a_template_outside_the_folder(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "t.jinja"
    outside.write_text("x")
    (folder / "chat_template.jinja").symlink_to(outside)
    with pytest.raises(DeploymentError, match="leads out"):
        chat_prompt(folder, SAID, file="chat_template.jinja")


def test_without_jinja_the_whole_prompt_is_asked_for(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(DependencyError, match="pip install jinja2"):
        rendered(folder, "x")


def test_an_old_sandbox_is_not_trusted(folder, monkeypatch):
    import jinja2

    monkeypatch.setattr(jinja2, "__version__", "3.1.5")
    with pytest.raises(DependencyError, match="known holes"):
        rendered(folder, "x")
