"""`ssh-deploy run --prompt` at the command line: text as it comes, several adapters, JSON, mistakes."""

import json

import pytest
from click.testing import CliRunner

from ssh_deploy import Deployment
from ssh_deploy.cli.main import main


@pytest.fixture
def run(decoder):
    return lambda *words, stdin=None: CliRunner().invoke(main, ["run", str(decoder[2]), *words], input=stdin)


@pytest.fixture(scope="module")
def said(decoder):
    with Deployment.open(decoder[2]) as deployment:
        pairs = [("the quick", "red"), ("h", "green"), ("h", None)]
        return {pair: deployment.generate([pair[0]], pair[1], max_new_tokens=9)[0] for pair in pairs}


def test_one_prompt_is_its_text(run, said):
    done = run("--adapter", "red", "--prompt", "the quick", "--max-new-tokens", "9")
    assert done.exit_code == 0, done.output
    assert done.stdout == said["the quick", "red"].text + "\n"


def test_several_prompts_each_with_its_adapter(run, said):
    words = ["--adapter", "red", "--adapter", "green", "--prompt", "the quick", "--prompt", "h"]
    done = run(*words, "--max-new-tokens", "9")
    want = [f"[red]  the quick\n{said['the quick', 'red'].text}", f"[green]  h\n{said['h', 'green'].text}"]
    assert done.stdout == "\n".join(want) + "\n"


def test_json_and_standard_input(run, said):
    done = run("--base", "--prompt", "h", "--stdin", "--max-new-tokens", "9", "--json", stdin="the quick\n\n")
    answers = json.loads(done.stdout)["answers"]
    assert [a["prompt"] for a in answers] == ["h", "the quick"]
    assert answers[0]["text"] == said["h", None].text
    assert answers[0]["tokens"] == list(said["h", None].tokens)


def test_a_seed_and_its_options(run):
    words = ["--base", "--prompt", "h", "--temperature", "1.5", "--top-k", "40", "--top-p", "0.9"]
    first, again = (run(*words, "--seed", "3").stdout for _ in range(2))
    assert first == again != run(*words, "--seed", "4").stdout


def test_chat_and_stop(run, decoder):
    done = run("--adapter", "red", "--prompt", "who", "--chat", "--max-new-tokens", "9", "--json")
    with Deployment.open(decoder[2]) as deployment:
        want = deployment.generate(["who"], "red", chat=True, max_new_tokens=9)[0]
    assert json.loads(done.stdout)["answers"][0]["tokens"] == list(want.tokens)
    stop = want.text[3:5]
    words = ["--adapter", "red", "--prompt", "who", "--chat", "--max-new-tokens", "9", "--stop", stop]
    assert run(*words).stdout == want.text[: want.text.find(stop)] + "\n"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--prompt", "x"], 2, "--adapter NAME, or --base"),
        (["--base", "--prompt", "x", "--text", "y"], 2, "one of the two"),
        (["--base", "--text", "y", "--seed", "0"], 2, "one of the two"),
        (["--base", "--chat"], 2, "--prompt TEXT"),
        (["--base", "--chat", "--stdin"], 1, "no prompt to go on from"),
        (["--base", "--prompt", ""], 1, "The prompt is empty"),
        (["--base", "--prompt", "x" * 200], 1, "200 tokens; the model's context of 96"),
        (["--adapter", "rad", "--prompt", "x"], 1, "red"),
        (["--base", "--prompt", "x", "--temperature", "-1"], 1, "temperature is -1"),
        (["--base", "--prompt", "x", "--top-p", "0"], 1, "top_p is 0"),
        (["--base", "--text", "x"], 1, "run --prompt"),
        (["--how-many-fit", "--prompt", "x"], 2, "answers no texts"),
    ],
)
def test_mistakes(run, words, code, says):
    done = run(*words, stdin="")
    assert done.exit_code == code, done.output
    assert says in done.stderr


def test_an_encoder_does_not_go_on(exported):
    done = CliRunner().invoke(main, ["run", str(exported("bert")[2]), "--base", "--prompt", "x"])
    assert done.exit_code == 1
    assert "ssh-deploy run --text" in done.stderr
