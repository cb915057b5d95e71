"""Encoder-decoders: the numbers of the model's own forward, by rows of their own, in every stage of ours."""

import json
import math

import pytest
import torch

from annotate.records import DataError
from reward.batch import Example
from reward.model import CheckpointError, load_policy, load_reward, new_reward_model, save
from reward.passes import score_head, start_token, trunk
from reward.paths import choose, describe
from reward.sampler import Sampler
from reward.tokens import batch_of, forward, rewards
from stages import dpo, kto, ppo, rloo, rm, sft
from stages.ppo_models import add_value
from stages.ppo_trainer import PPOConfig, PPOTrainer
from tests import tiny

EXAMPLES = [
    Example([5, 6, 7, 8, 9], ([10, 11, 1], [12, 13, 14, 15, 16, 17, 1])),
    Example([20], ([21, 1], [22, 23, 1], [1])),
    Example(list(range(30, 60)), ([60, 61, 62, 1],)),
]
KIND, RUDE = "We are sorry and send a new one.", "No, go away."
TRAINER = {"max_steps": 30, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1}


@pytest.fixture(scope="module", params=tiny.ENCODER_DECODERS)
def folder(request, tmp_path_factory):
    return str(tiny.save_folder(tmp_path_factory.mktemp("folder"), request.param))


@pytest.fixture(scope="module")
def bart(tmp_path_factory):
    return str(tiny.save_folder(tmp_path_factory.mktemp("bart"), "bart"))


def plain(model, prompt, completion, temperature=1.0):
    """(C,) log-probabilities by the model's own forward, of one sequence alone."""
    before = torch.tensor([[model.config.decoder_start_token_id, *completion[:-1]]])
    logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=before).logits[0]
    return (logits / temperature).log_softmax(-1)[range(len(completion)), completion]


def plain_rows(model, temperature=1.0):
    return torch.cat([plain(model, e.prompt, c, temperature) for e in EXAMPLES for c in e.completions])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_numbers_and_the_gradient_are_those_of_the_models_own_forward(folder, temperature):
    model, _ = load_policy(folder)
    path = choose(model, EXAMPLES)
    assert "a row for each completion (refused: an encoder reads each prompt by itself)" in describe(path)
    batch = batch_of(model, EXAMPLES)
    gradients = []
    for found in (forward(model, batch, temperature)[0][batch.mask], plain_rows(model, temperature)):
        model.zero_grad()
        found.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        gradients.append(found.detach())
    ours, of_ours, theirs, of_theirs = gradients
    torch.testing.assert_close(of_ours, of_theirs, atol=1e-5, rtol=1e-5)
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_a_checkpoint_is_loaded_whole(bart):
    """The causal class of this family would take its decoder, and leave the encoder away."""
    assert type(load_policy(bart)[0]).__name__ == "BartForConditionalGeneration"


def test_no_token_to_start_with(tmp_path):
    folder = tiny.save_folder(tmp_path, "t5")
    for name in ("config.json", "generation_config.json"):
        tiny.change(folder / name, decoder_start_token_id=None)
    with pytest.raises(DataError, match="set decoder_start_token_id"):
        load_policy(folder)


def test_replies_are_drawn_from_what_they_are_scored_by(folder):
    model, tokenizer = load_policy(folder)
    add_value(model, None, None, PPOConfig(""))
    torch.nn.init.normal_(model.value_head.weight)
    prompts = [example.prompt for example in EXAMPLES for _ in range(3)]
    keys = [str(i) for i in range(9)]
    replies = Sampler(model, tokenizer, 12).sample(prompts, keys)
    alone = [Sampler(model, tokenizer, 12).sample([p], [k])[0] for p, k in zip(prompts, keys, strict=True)]
    assert [r.tokens for r in replies] == [r.tokens for r in alone]
    for prompt, reply in zip(prompts, replies, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(
                torch.tensor(reply.logprobs), plain(model, prompt, reply.tokens), atol=1e-4, rtol=1e-5
            )
            _, values = forward(model, batch_of(model, [Example(prompt, (reply.tokens,))]))
        torch.testing.assert_close(torch.tensor([reply.values]), values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reads", ["reply", "last"])
def test_a_score_is_that_of_the_decoders_own_states(folder, reads):
    model, _ = new_reward_model(folder)
    model.config.reward_reads = reads
    start = start_token(model)
    for example, scores in zip(EXAMPLES, rewards(model, EXAMPLES), strict=True):
        for completion, score in zip(example.completions, scores, strict=True):
            with torch.no_grad():
                states = trunk(model)(
                    input_ids=torch.tensor([example.prompt]),
                    decoder_input_ids=torch.tensor([[start, *completion]]),
                ).last_hidden_state[0]
                of_tokens = score_head(model)(states[1:] if reads == "reply" else states[-1:])
            assert score == pytest.approx(of_tokens.mean().item(), abs=1e-5)


def test_an_empty_completion_beside_others_changes_nothing(folder):
    model, _ = load_policy(folder)
    gradients = []
    for examples in (EXAMPLES, [*EXAMPLES, Example([5, 6], ([],))]):
        model.zero_grad()
        found = forward(model, batch_of(model, examples))[0].sum(1)[:6]
        found.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 1e-5


def test_a_score_does_not_depend_on_who_shares_the_batch(folder, tmp_path):
    model, tokenizer = new_reward_model(folder)
    together = rewards(model, EXAMPLES)
    choose(model, EXAMPLES)
    for example, scores in zip(EXAMPLES, together, strict=True):
        for completion, score in zip(example.completions, scores, strict=True):
            alone = rewards(model, [Example(example.prompt, (completion,))])
            assert alone == [[pytest.approx(score, abs=1e-5)]]
    model.save_pretrained(tmp_path)
    again, _ = load_reward(tmp_path, tokenizer)
    assert rewards(again, EXAMPLES) == together


def judged(count=48):
    """Kind beats rude, whichever comes first."""
    sides = [(KIND, RUDE, 2), (RUDE, KIND, -2)]
    return [tiny.judgement(i, *sides[i % 2], "train" if i % 4 else "test") for i in range(count)]


def logged(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def test_demonstrations_are_learnt(tmp_path, folder):
    run = tiny.run_in(tmp_path / "run", "sft")
    data = tiny.rows_file(tmp_path / "records.jsonl", tiny.records(12))
    sft.main(sft.Config(model=folder, data=data, max_new_tokens=20, trainer=TRAINER), run)
    losses = [line["loss"] for line in logged(run)]
    assert len(losses) == 30 and losses[-1] < losses[0] - 1
    assert "a row for each completion" in run.manifest.facts["path"]


@pytest.mark.parametrize("peft", [None, {"r": 4}])
def test_preferences_are_learnt_directly(tmp_path, folder, peft, monkeypatch):
    monkeypatch.setenv("PREFLOOP_RUNS", str(tmp_path / "runs"))
    run = tiny.run_in(tmp_path / "run", "dpo")
    rows = tiny.rows_file(tmp_path / "judgements.jsonl", judged())
    dpo.main(dpo.Config(policy=folder, judgements=rows, trainer=TRAINER, peft=peft), run)
    assert run.manifest.metrics["first_batch_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert logged(run)[-1]["accuracy"] == 1.0


def test_a_reward_model_is_learnt(tmp_path, folder):
    run = tiny.run_in(tmp_path / "run", "rm")
    torch.manual_seed(0)
    rows = tiny.rows_file(tmp_path / "judgements.jsonl", judged())
    rm.main(rm.Config(policy=folder, judgements=rows, trainer=TRAINER), run)
    assert run.manifest.metrics["accuracy"] == 1.0


def test_ppo_starts_where_it_is_and_learns(tmp_path, folder):
    policy, tokenizer = load_policy(folder)
    args = PPOConfig(
        str(tmp_path),
        total_episodes=320,
        per_device_train_batch_size=8,
        num_mini_batches=4,
        num_ppo_epochs=2,
        response_length=8,
        learning_rate=1e-2,
        kl_coef=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )

    def count_low(completion_ids, **_):
        return [float(sum(token < 100 for token in ids)) for ids in completion_ids]

    prompts = [{"prompt": f"My {word} broke."} for word in tiny.WORDS]
    trainer = PPOTrainer(policy, count_low, args, prompts, processing_class=tokenizer)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "reward" in line]
    assert lines[0]["ratio"] == pytest.approx(1, abs=1e-5) and lines[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["reward"] > lines[0]["reward"] + 1


def test_trainers_that_take_none_say_so(tmp_path, bart):
    said = "an encoder-decoder, which TRL's trainers do not take"
    rows = tiny.rows_file(tmp_path / "judgements.jsonl", judged())
    with pytest.raises(CheckpointError, match=said):
        kto.main(kto.Config(policy=bart, judgements=rows), tiny.run_in(tmp_path / "kto", "kto"))
    model, tokenizer = new_reward_model(bart)
    save(model, tokenizer, tmp_path / "rm")
    prompts = tiny.rows_file(tmp_path / "records.jsonl", tiny.records(2, use="policy"))
    config = rloo.Config(policy=bart, reward=str(tmp_path / "rm"), prompts=prompts)
    with pytest.raises(CheckpointError, match=said):
        rloo.main(config, tiny.run_in(tmp_path / "rloo", "rloo"))


def test_the_stage_ppo_takes_them(tmp_path, bart):
    model, tokenizer = new_reward_model(bart)
    save(model, tokenizer, tmp_path / "rm")
    prompts = tiny.rows_file(tmp_path / "records.jsonl", tiny.records(8, use="policy"))
    trainer = {"total_episodes": 16, "per_device_train_batch_size": 4, "response_length": 8}
    config = ppo.Config(policy=bart, reward=str(tmp_path / "rm"), prompts=prompts, trainer=trainer)
    run = tiny.run_in(tmp_path / "run", "ppo")
    ppo.main(config, run)
    assert type(load_policy(run.path / "model")[0]).__name__ == "BartForConditionalGeneration"
