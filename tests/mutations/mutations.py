"""One-line errors that the tests must notice. Each old text stands exactly once in its file."""

from dataclasses import dataclass

DMD, GDMD, REFL = ("methods/test_dmd_update.py",), ("methods/test_gdmd_update.py",), ("methods/test_refl_update.py",)
PARTS, WIRING = ("methods/test_micro_batches.py",), ("methods/test_lightning_wiring.py",)
ROLES, SIZES = ("roles/test_gradient_of_roles.py",), ("families/test_not_square.py",)


@dataclass(frozen=True)
class Mutation:
    """An error.

    Args:
        name: What goes wrong.
        file: Inside ``src/gdmd_lightning``.
        old, new: Text and what replaces it.
        tests: Files below ``tests`` that must fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def errors(file: str, tests: tuple[str, ...], *entries: tuple[str, str, str]) -> list[Mutation]:
    """Errors in one file: ``(name, old, new)`` each."""
    return [Mutation(name, file, old, new, tests) for name, old, new in entries]


MUTATIONS = [
    *errors(
        "methods/dmd2.py",
        ("methods/test_dmd2_update.py",),
        (
            "dmd2: no gradient through the fake score",
            'features("fake_score", noisy, through=True)',
            'features("fake_score", noisy)',
        ),
        ("dmd2: generator's weight ignored", "+ self.gan.generator_weight * adversarial", "+ adversarial"),
        (
            "dmd2: real and generated swapped",
            "((real, pair.eps_real), (x0, pair.eps_fake))",
            "((x0, pair.eps_fake), (real, pair.eps_real))",
        ),
        (
            "dmd2: weights swapped",
            "weight = batch.real_x0, self.gan.fake_score_weight",
            "weight = batch.real_x0, self.gan.generator_weight",
        ),
        (
            "dmd2: critic compares at the generator's levels",
            'self.stream("gan critic", turn)',
            'self.stream("gan", turn)',
        ),
        (
            "dmd2: every turn compares at the same levels",
            'self.stream("gan critic", turn)',
            'self.stream("gan critic")',
        ),
        ("dmd2: images of other rows", "pair.renoised(x[rows], eps_of", "pair.renoised(x[: len(x[rows])], eps_of"),
        (
            "dmd2: head's gradient does not reach the fake score",
            'logits("discriminator", each, through=True) for',
            'logits("discriminator", each) for',
        ),
        (
            "dmd2: discriminator's weight ignored",
            "share * weight * gan_discriminator_loss",
            "share * gan_discriminator_loss",
        ),
        ("dmd2: discriminator's share ignored", "backward(share * weight * gan", "backward(weight * gan"),
        ("dmd2: images of the first update", 'self.stream("images")', "torch.Generator()"),
        ("dmd2: images unchecked", "self.images.check(data)", "pass"),
        ("dmd2: seed ignored", "Head(self.gan.hidden, self.seed)", "Head(self.gan.hidden)"),
    ),
    *errors(
        "methods/gan_terms.py",
        ("methods/test_dmd2_update.py",),
        ("gan: noise of other rows", "renoise(x, sigma, eps[rows])", "renoise(x, sigma, eps[: len(x)])"),
        ("gan: levels of other rows", "sigma = self.sigma[rows]", "sigma = self.sigma[: len(x)]"),
        (
            "gan: one noise for both",
            "return cls(sigma.to(eps_real), eps_real, eps_fake)",
            "return cls(sigma.to(eps_real), eps_real, eps_real)",
        ),
        ("gan: levels of matching", "draw_renoise_sigmas(gan.renoise_distribution,", "draw_renoise_sigmas(Uniform(),"),
    ),
    *errors(
        "objectives/gan.py",
        ("methods/test_dmd2_update.py",),
        ("gan: generator's sign", "return softplus(-fake).mean()", "return softplus(fake).mean()"),
        ("gan: discriminator's real sign", "softplus(-real) + softplus(fake)", "softplus(real) + softplus(fake)"),
        ("gan: discriminator's fake sign", "softplus(-real) + softplus(fake)", "softplus(-real) + softplus(-fake)"),
    ),
    *errors(
        "roles/heads.py",
        ("methods/test_dmd2_update.py",),
        ("head: seed ignored in its weights", 'named_seed("head", settings.seed)', 'named_seed("head")'),
        ("head: first token only", "logits.mean((1, 2))", "logits[:, 0, 0]"),
    ),
    *errors(
        "roles/adapters.py",
        ("methods/test_dmd2_update.py",),
        ("head taken for the teacher", ' and name.split(".")[0] not in self.heads', ""),
    ),
    *errors(
        "data/images.py",
        ("data/test_images.py",),
        ("images: first file always", "files[chosen]", "files[0]"),
        ("images: width and height swapped", "(width, height), Image", "(height, width), Image"),
        ("images: not scaled to 1", "permute(2, 0, 1) / 255", "permute(2, 0, 1) / 256"),
        ("images: same scenes every time", "np.random.default_rng(seed)", "np.random.default_rng(0)"),
        ("images: missing files accepted", "if not file.is_file():", "if False:"),
    ),
    *errors(
        "methods/ac_dmd.py",
        ("methods/test_ac_dmd_update.py",),
        ("ac_dmd: renoised as clean samples", "s[rows], t, draw.eps", "0 * s[rows], t, draw.eps"),
        (
            "ac_dmd: ends of other rows",
            "self.generator_transition(latents, s[rows], noise",
            "self.generator_transition(latents, s[: len(latents)], noise",
        ),
        ("ac_dmd: noise of other rows", "s[rows], noise[rows])", "s[rows], noise[: len(latents)])"),
        ("ac_dmd: noise back of other rows", "back[rows])", "back[: len(latents)])"),
        ("ac_dmd: one noise forth and back", 'self.noise(batch, "transition back")', 'self.noise(batch, "transition")'),
        ("ac_dmd: levels of other rows", "t = draw.sigma[rows, 0]", "t = draw.sigma[: len(latents), 0]"),
    ),
    *errors(
        "methods/ambient.py",
        ("methods/test_ac_dmd_update.py",),
        (
            "ambient: ends of the previous step",
            "self.sigmas[state.step_index + 1].to",
            "self.sigmas[state.step_index].to",
        ),
        (
            "ambient: teacher without guidance",
            'velocity("teacher", at, guidance_scale=scale)',
            'velocity("teacher", at)',
        ),
        (
            "ambient: fake score steps back with other noise",
            'velocity("fake_score", at), s, noise',
            'velocity("fake_score", at), s, -noise',
        ),
        ("ambient: normalizer of the fake score", "normalizer(x_s, real", "normalizer(x_s, fake"),
        ("ambient: normalizer floor ignored", "normalizer(x_s, real, self.matching.floor)", "normalizer(x_s, real)"),
        (
            "ambient: critic levels ignored",
            "self.matching.fake_score_renoise_distribution or self.matching.renoise",
            "self.matching.renoise",
        ),
        ("ambient: critic levels below s", "sigma_min=self.sigma_min(state))", "sigma_min=None)"),
        (
            "ambient: critic learns clean samples",
            "NoisyLatents(ambient_renoise(x_s, s, t, eps)",
            "NoisyLatents(ambient_renoise(x_s, 0 * s, t, eps)",
        ),
        (
            "ambient: every turn draws the same",
            'self.stream("critic", turn), self.ends',
            'self.stream("critic"), self.ends',
        ),
        (
            "ambient: every turn takes the same step down",
            'self.stream("consistency", turn)',
            'self.stream("consistency")',
        ),
        (
            "ambient: consistency weight ignored",
            "matching + self.consistency.weight * consistency",
            "matching + consistency",
        ),
        (
            "ambient: gradient through the step down",
            "self.transition(at, v.detach(), lower",
            "self.transition(at, v, lower",
        ),
        (
            "ambient: consistency at the upper level",
            "NoisyLatents(x, lower, at.conditioning)",
            "NoisyLatents(x, at.sigma, at.conditioning)",
        ),
        ("ambient: one transition instead of two", "after[0], after[1])", "after[0], after[0])"),
        ("ambient: anchor without gradient", "consistency_loss(at.x0(v)", "consistency_loss(at.x0(v.detach())"),
        (
            "ambient: stale transitions",
            "x_s = self.generator_transition(state.latents, self.ends(state), noise)",
            "self.generator_transition(state.latents, self.ends(state), noise)",
        ),
        ("ambient: fresh transitions with one noise", 'f"critic transition {turn}"', '"transition"'),
        (
            "ambient: noises of other rows",
            "[noise[rows] for noise in noises]",
            "[noise[: len(part)] for noise in noises]",
        ),
        ("ambient: lower levels of other rows", "v, lower[rows],", "v, lower[: len(part)],"),
        ("ambient: logs not averaged over turns", "weighted_sum(logs, share / updates,", "weighted_sum(logs, share,"),
        (
            "ambient: one noise for all estimators refused nothing",
            "consistency.weight > 0 and not",
            "consistency.weight < 0 and not",
        ),
        ("ambient: low levels accepted", "highest <= float(self.sigmas[1])", "highest < 0"),
    ),
    *errors(
        "methods/settings.py",
        ("methods/test_ac_dmd_update.py",),
        ("consistency: reach ignored", "down = self.reach *", "down ="),
        ("consistency: steps up", "(t - down).clamp", "(t + down).clamp"),
        ("consistency: asked at level 0", "clamp(min=LOWEST_LEVEL)", "clamp(min=0)"),
        ("consistency: one noise for both", "_ in range(2)]", "_ in range(1)] * 2"),
    ),
    *errors(
        "objectives/ambient.py",
        ("objectives/test_ambient_loss.py",),
        (
            "ambient: sign of the target",
            "* eps - per_sample(q / (1 - s), x_s) * x_s",
            "* eps + per_sample(q / (1 - s), x_s) * x_s",
        ),
        ("ambient: square forgotten", "t + (1 - t) * s**2 / (1 - s) ** 2", "t + (1 - t) * s / (1 - s)"),
        ("ambient: prediction not scaled", "per_sample(q, x_s) * velocity - scaled", "velocity - scaled"),
        ("ambient: variance of the noise", "t**2 - a**2 * s**2", "t**2 - s**2"),
        ("ambient: weight unlimited", "clamp(min=1 / largest_weight)", "clamp(min=1e-9)"),
        ("ambient: no weight", "(error / (q**2).clamp(min=1 / largest_weight)).mean()", "error.mean()"),
        ("ambient: consistency of one draw", "((h_1 - h) * (h_2 - h)).mean()", "(h_1 - h).square().mean()"),
    ),
    *errors(
        "methods/gndm.py",
        ("methods/test_gndm_update.py",),
        (
            "samples normalized alone",
            "return match, group_mean(match.n, batch.groups.to(x.device))",
            "return match, match.n",
        ),
        ("level of the last member", 'places, "amin")', 'places, "amax")'),
        ("levels not shared in a group", "self.draw_renoise(state).with_levels_of(first)", "self.draw_renoise(state)"),
        (
            "group normalizers of other rows",
            "match.target[rows], n[rows])\n                backward",
            "match.target[rows], n[: len(part)])\n                backward",
        ),
        ("gndmr: normalizers of other rows", "n[rows], o[rows], eps[rows]", "n[: len(y)], o[rows], eps[rows]"),
        ("gndmr: advantages of other rows", "n[rows], o[rows], eps[rows]", "n[rows], o[: len(y)], eps[rows]"),
        ("gndmr: noise of other rows", "n[rows], o[rows], eps[rows]", "n[rows], o[rows], eps[: len(y)]"),
        ("gndmr: reward's weight ignored", "matching + self.weight * group", "matching + group"),
        ("gndmr: matching is no reward", "return matching + self.weight", "return self.weight"),
        ("gndmr: policy weight ignored", "+ self.lambda_policy * term", "+ term"),
        ("gndmr: clip ignored", "optimality(advantages, self.combination.clip)", "optimality(advantages)"),
        ("gndmr: spread ignored for matching", "match.fake), groups, self.spread)", "match.fake), groups)"),
        ("gndmr: spread ignored for the reward", "(rewards, groups, self.spread)", "(rewards, groups)"),
        ("gndmr: policy noise of renoising", 'self.stream("policy")', 'self.stream("renoise")'),
    ),
    *errors(
        "objectives/distribution_matching.py",
        ("methods/test_gndm_update.py",),
        ("R_dm of the wrong sign", "return toward_fake - toward_real", "return toward_real - toward_fake"),
    ),
    *errors(
        "methods/base.py",
        ("methods/test_gndm_update.py",),
        ("single samples not refused", 'getattr(data, "group_size", 2) < 2', 'getattr(data, "group_size", 2) < 1'),
    ),
    *errors(
        "methods/matching.py",
        ("methods/test_decoupled_guidance.py",),
        (
            "guidance of its own level subtracted",
            'latents) + self.roles.guidance("teacher", at_guidance, scale)',
            'latents) - self.roles.guidance("teacher", at_guidance, scale)',
        ),
        (
            "guidance asked at the level of the matching",
            'self.roles.guidance("teacher", at_guidance, scale)',
            'self.roles.guidance("teacher", latents, scale)',
        ),
        ("guidance asked of the fake score", 'guidance("teacher", at', 'guidance("fake_score", at'),
        ("guidance levels forgotten", 'if choice == "shared" or', 'if choice != "other" or'),
        (
            "guidance above the end of the step",
            'self.sigmas[state.step_index] if choice == "above"',
            'self.sigmas[state.step_index + 1] if choice == "above"',
        ),
        ("guidance at all levels only above", 'if choice == "above" else None', 'if choice != "shared" else None'),
        ("guidance levels of the matching's stream", 'self.stream("guidance level")', 'self.stream("level")'),
        (
            "guidance levels of the first micro-batch",
            "self.guidance_sigma[rows]\n        return RenoiseDraw",
            "self.guidance_sigma[: len(self.sigma[rows])]\n        return RenoiseDraw",
        ),
    ),
    *errors(
        "families/base.py",
        ("methods/test_decoupled_guidance.py",),
        ("guidance one too large", "(guidance_scale - 1) * (conditional", "guidance_scale * (conditional"),
    ),
    *errors(
        "families/flux2.py",
        ("families/test_guidance.py",),
        ("embedded guidance without its base", "return guided - plain", "return guided"),
    ),
    *errors(
        "roles/base.py",
        ("methods/test_decoupled_guidance.py", "families/test_guidance.py"),
        (
            "guidance counted once",
            "self._evaluate(role, latents, call, 2, 1.0, False)",
            "self._evaluate(role, latents, call, 1, 1.0, False)",
        ),
        ("guidance of the wrong sign", "return -per_sample(latents.sigma", "return per_sample(latents.sigma"),
    ),
    *errors(
        "methods/matching.py",
        DMD + GDMD + PARTS,
        ("target sign flipped", "return self.x - dm_direction(", "return self.x + dm_direction("),
        ("gradient log without normalizer", ".abs().mean(1) / self.n", ".abs().mean(1)"),
        (
            "one renoise noise for a group",
            "eps.unflatten(0, (batch, group)), guidance_sigma)",
            "eps.unflatten(0, (batch, group))[:, :1].expand(batch, group, *self.latent_shape), guidance_sigma)",
        ),
        (
            "one level for all targets",
            "levels = len(state.latents), 1 if share_sigma else group",
            "levels = len(state.latents), 1",
        ),
        ("snapshots with different levels", "1 if share_sigma else group", "group"),
        ("renoise with the level stream", 'self.stream("level"), sigma_min', 'self.stream("renoise"), sigma_min'),
        (
            "teacher without guidance",
            'self.roles.x0("teacher", latents, guidance_scale=scale)',
            'self.roles.x0("teacher", latents) + 0',
        ),
        (
            "teacher swapped with fake score",
            'self.roles.x0("teacher", latents,',
            'self.roles.x0("fake_score", latents,',
        ),
        (
            "fake score guided",
            "return self.roles.x0(scores[0], latents)",
            "return self.roles.x0(scores[0], latents, guidance_scale=self.matching.guidance_scale)",
        ),
        (
            "normalizer of the fake score",
            "normalizer(x, real, self.matching.floor)",
            "normalizer(x, fake, self.matching.floor)",
        ),
        ("normalizer floor ignored", "normalizer(x, real, self.matching.floor)", "normalizer(x, real)"),
        (
            "samples repeated in the wrong order",
            "x.detach().repeat_interleave(group, dim=0)",
            "x.detach().repeat(group, 1, 1, 1)",
        ),
        (
            "conditioning of another row",
            "conditioning.repeat(group))",
            "conditioning.repeat(group).select(slice(None, None)).select(torch.arange(batch * group).roll(1)))",
        ),
        (
            "snapshots asked in wrong rows",
            "torch.arange(group).repeat(batch)",
            "torch.arange(group).repeat_interleave(batch)",
        ),
        ("snapshots never asked", "turn % len(scores) == k", "turn * 0 == k"),
        (
            "snapshot answers from the fake score",
            "self.roles.x0(role, latents.select(rows))",
            "self.roles.x0(scores[0], latents.select(rows))",
        ),
        (
            "critic levels ignored",
            "self.renoise_law(own or self.matching.renoise_distribution)",
            "self.renoise_law(self.matching.renoise_distribution)",
        ),
        ("critic never steps twice", "range(self.matching.fake_score_updates)", "range(1)"),
        ("every critic turn draws the same", 'self.stream("critic", turn)', 'self.stream("critic")'),
        ("critic stream is the renoise stream", 'self.stream("critic", turn)', 'self.stream("renoise", turn)'),
        (
            "critic levels not stratified",
            "draw_renoise_sigmas(distribution, 1, batch, rng)[0]",
            "draw_renoise_sigmas(distribution, batch, 1, rng)[:, 0]",
        ),
        (
            "fresh samples not fresh",
            'self.matching.fake_score_samples == "fresh"',
            'self.matching.fake_score_samples == "other"',
        ),
        (
            "reused samples not reused",
            'self.matching.fake_score_samples == "fresh"',
            'self.matching.fake_score_samples != "other"',
        ),
        ("fresh samples the same every turn", 'f"critic rollout {turn}"', '"critic rollout"'),
        (
            "fresh samples of the generator's stream",
            'self.rollout_state(batch, f"critic rollout {turn}")',
            "self.rollout_state(batch)",
        ),
        (
            "critic target with x0 and eps exchanged",
            "latents.select(rows)), x0[rows], eps[rows])",
            "latents.select(rows)), eps[rows], x0[rows])",
        ),
        (
            "critic target of the wrong rows",
            "latents.select(rows)), x0[rows], eps[rows])",
            "latents.select(rows)), x0[rows], eps[:len(x0[rows])])",
        ),
        (
            "critic input renoised with other noise",
            "NoisyLatents(renoise(x0, sigma, eps), sigma, batch",
            "NoisyLatents(renoise(x0, sigma, eps.flip(0)), sigma, batch",
        ),
        ("critic share forgotten", "backward(share * loss)", "backward(loss)"),
        (
            "critic loss log not averaged",
            "weighted_sum(logs, 1 / self.matching.fake_score_updates, **done)",
            "weighted_sum(logs, 1.0, **done)",
        ),
        ("critic steps the generator", 'with learn("fake_score") as backward', 'with learn("generator") as backward'),
        ("step interval ignored", 'if self.matching.interval == "step" else None', "if False else None"),
        ("step interval of the start", "self.sigmas[state.step_index + 1]", "self.sigmas[state.step_index]"),
    ),
    *errors(
        "methods/dmd.py",
        DMD + PARTS,
        ("dmd share forgotten", "backward(share * loss)", "backward(loss)"),
        ("dmd targets of the wrong rows", "draw.select(rows)", "draw.select(slice(0, len(x)))"),
        (
            "dmd critic on a part of the samples",
            "x0 = torch.cat(samples)",
            "x0 = samples[0].repeat(len(samples), 1, 1, 1)[:len(batch)]",
        ),
        (
            "two dmd logs swapped",
            "gradient=match.gradient.mean(), normalizer=match.n.mean()",
            "normalizer=match.gradient.mean(), gradient=match.n.mean()",
        ),
        ("clamped share of the others", "match.n <= self.matching.floor", "match.n > self.matching.floor"),
    ),
    *errors(
        "methods/gdmd.py",
        GDMD + PARTS,
        ("gdmd share forgotten", "backward(share * loss)", "backward(loss)"),
        (
            "targets judged under another prompt",
            "tuple(prompt for prompt in batch.prompts for _ in range(size))",
            "batch.prompts * size",
        ),
        (
            "rewards of samples and targets swapped",
            "torch.cat([latents, x.detach()]), (*prompts, *batch.prompts)",
            "torch.cat([x.detach(), latents]), (*batch.prompts, *prompts)",
        ),
        (
            "all prompts in one group",
            "self.advantages(rewards, sample_reward, batch.groups.to(x.device))",
            "self.advantages(rewards, sample_reward, 0 * batch.groups.to(x.device))",
        ),
        ("advantage clip ignored", "optimality(advantages, self.advantages.clip)", "optimality(advantages)"),
        (
            "verdict reversed for all",
            "optimality(advantages, self.advantages.clip)",
            "1 - optimality(advantages, self.advantages.clip)",
        ),
        (
            "lambda instead of 2 lambda",
            "gradient_weight(o, 2 * self.lambda_policy)",
            "gradient_weight(o, self.lambda_policy)",
        ),
        ("lambda ignored in the full form", "+ self.lambda_policy * term", "+ term"),
        ("distillation left out of the full form", "return dm_loss(each, y, n) + self", "return self"),
        ("optimality of the wrong rows", "judged.optimality[rows]", "judged.optimality[:len(part)]"),
        ("policy noise is the renoise noise", 'self.stream("policy")', 'self.stream("renoise")'),
        ("old policy with the average's decay", "decay=self.policy.old_decay", "decay=self.ema_decay"),
        (
            "old policy follows the fake score",
            'RoleSpec("old", average_of="generator"',
            'RoleSpec("old", average_of="fake_score"',
        ),
        ("groups share a level always", 'share_sigma=over == "snapshot"', "share_sigma=True"),
        ("snapshot groups have many levels", 'share_sigma=over == "snapshot"', "share_sigma=False"),
        (
            "snapshots in renoise groups",
            'past = 0 if targets.over == "renoise" else targets.snapshots',
            "past = targets.snapshots",
        ),
        (
            "record of the wrong snapshot",
            "snapshot=torch.arange(size) % len(scores)",
            "snapshot=torch.arange(size) // len(scores)",
        ),
        (
            "critic learns on targets",
            "self.train_fake_score(batch, state, judged.x, learn)",
            "self.train_fake_score(batch, state, judged.targets[:, 0], learn)",
        ),
        (
            "samples repeated out of order",
            "x.repeat_interleave(targets.shape[1], dim=0)",
            "x.repeat(targets.shape[1], 1, 1, 1)",
        ),
    ),
    *errors(
        "methods/reward_terms.py",
        GDMD,
        (
            "policy noise always zero",
            'or policy.at == "state":\n        return torch.zeros',
            "or True:\n        return torch.zeros",
        ),
    ),
    *errors(
        "methods/matching.py",
        GDMD,
        ("snapshots never kept", "if snapshots and", "if False and"),
        ("snapshots kept in every update", "self.updates % every == 0", "True"),
        ("snapshots kept in one slot", "self.updates // every % len(snapshots)", "0"),
        ("snapshots of the generator", 'self.roles.copy("fake_score", ', 'self.roles.copy("generator", '),
    ),
    *errors(
        "methods/advantages.py",
        GDMD,
        ("strata not centered", "if self.center_strata:", "if False:"),
        ("strata always centered", "if self.center_strata:", "if True:"),
        (
            "strata are samples",
            "torch.arange(size, device=rewards.device).repeat(batch)",
            "torch.arange(batch, device=rewards.device).repeat_interleave(size)",
        ),
        (
            "state groups across samples",
            "torch.arange(batch, device=rewards.device).repeat_interleave(size)",
            "torch.arange(batch, device=rewards.device).repeat(size)",
        ),
        (
            "prompt groups in the wrong order",
            "members = groups.repeat_interleave(size)",
            "members = groups.repeat(size)",
        ),
        ("targets minus another sample", "sample_reward.repeat_interleave(size)", "sample_reward.repeat(size)"),
        (
            "samples better than targets",
            "values = values - sample_reward",
            "values = sample_reward.repeat_interleave(size) - values + 0 * sample_reward",
        ),
        ("spread ignored", "group_advantages(values, members, self.spread)", "group_advantages(values, members)"),
    ),
    *errors(
        "objectives/advantages.py",
        GDMD,
        ("group mean not removed", "centered = rewards - group_mean(rewards, groups)", "centered = rewards"),
        ("spread of the group for the batch", 'if spread == "group" else', 'if spread == "batch" else'),
        ("variance instead of its root", "std = variance.sqrt()", "std = variance"),
    ),
    *errors(
        "objectives/distribution_matching.py",
        DMD + GDMD,
        ("direction reversed", "return (fake - real).detach()", "return (real - fake).detach()"),
        ("factor one half lost", "weight * 0.5 * squared / n", "weight * squared / n"),
        ("loss not normalized", "weight * 0.5 * squared / n", "weight * 0.5 * squared"),
        ("weight ignored", "weight * 0.5 * squared / n", "0.5 * squared / n"),
        ("weight without sign", "weight * 0.5 * squared / n", "abs(weight) * 0.5 * squared / n"),
    ),
    *errors(
        "objectives/policy.py",
        GDMD,
        (
            "verdict reversed in the policy loss",
            "o * toward / n_plus + (1 - o) * away / n_minus",
            "(1 - o) * toward / n_plus + o * away / n_minus",
        ),
        (
            "policies exchanged",
            "return (1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v",
            "beta = -beta\n    return (1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v",
        ),
        ("policy not divided by beta", "/ n_minus) / beta)", "/ n_minus))"),
        (
            "optimality twice as steep",
            "advantage.clamp(-clip, clip) / (2 * clip)",
            "advantage.clamp(-clip, clip) / clip",
        ),
        ("optimality unclipped", "advantage.clamp(-clip, clip) / (2 * clip)", "advantage / (2 * clip)"),
        ("weight of the opposite sign", "1 + strength * (2 * o - 1)", "1 - strength * (2 * o - 1)"),
    ),
    *errors(
        "objectives/score_matching.py", DMD, ("flow target reversed", "(eps - x0)).square()", "(x0 - eps)).square()")
    ),
    *errors(
        "methods/reward_terms.py",
        GDMD,
        ("policy normalize ignored", 'if policy.normalize == "error" else', "if True else"),
        ("policy never error-normalized", 'if policy.normalize == "error" else', "if False else"),
        ("policy always at the target", 'if policy.at == "state":', "if False:"),
        (
            "policy at another level",
            "sigma = latents.sigma.repeat_interleave(size)",
            "sigma = latents.sigma.repeat(size)",
        ),
        (
            "policy under another prompt",
            "latents.conditioning.repeat(size))",
            "latents.conditioning.select(torch.arange(len(x)).repeat(size)))",
        ),
        ("old policy is the generator", 'for role in ("generator", "old")', 'for role in ("generator", "generator")'),
        ("old policy is the average", 'roles.x0("old", latents)', 'roles.x0("ema", latents)'),
        ("policies exchanged at the target", "plus, minus = (at_target", "minus, plus = (at_target"),
        ("beta ignored at the state", 'roles.x0("old", latents), policy.beta)', 'roles.x0("old", latents), 1.0)'),
    ),
    *errors(
        "methods/base.py",
        DMD + REFL + WIRING,
        (
            "rollouts of the average",
            'self.predictor("generator", batch.conditioning), noise',
            'self.predictor("ema", batch.conditioning), noise',
        ),
        ("step index per sample", "stop = (batch.groups + first)", "stop = (torch.arange(len(batch)) + first)"),
        ("step index always the first group's", "stop = (batch.groups + first)", "stop = (0 * batch.groups + first)"),
        ("first step fixed", "(batch.groups + first) % self.steps", "batch.groups % self.steps"),
        ("step index ignored", "if step_index is not None:", "if False:"),
        (
            "state one step early",
            "noise, self.sigmas, self.sampler, rng, stop)",
            "noise, self.sigmas, self.sampler, rng, (stop - 1).clamp(min=0))",
        ),
        ("level of another step", "self.sigmas[stop].to(noise)", "self.sigmas[stop + 1].to(noise)"),
        ("state before the last step", "path.states[-1], self", "path.states[max(len(path.states) - 2, 0)], self"),
        (
            "rollout conditioning of the first rows",
            "else conditioning.select(rows)",
            "else conditioning.select(slice(0, len(rows)))",
        ),
        ("predictor without guidance", "chosen), guidance_scale=guidance_scale)", "chosen))"),
        ("average with no decay setting", "decay=self.ema_decay", "decay=0.9"),
        (
            "average of the fake score",
            'RoleSpec("ema", average_of="generator"',
            'RoleSpec("ema", average_of="fake_score"',
        ),
        (
            "generate asks the generator",
            "predict = self.predictor(role, self.embeddings(texts))",
            'predict = self.predictor("generator", self.embeddings(texts))',
        ),
        (
            "teacher sampled on the student's levels",
            "self.family.teacher_sigmas(steps, self.latent_shape)",
            "self.family.few_step_sigmas(steps, self.latent_shape)",
        ),
        ("sums without share", "part = share * value.detach()", "part = value.detach()"),
    ),
    *errors(
        "samplers.py",
        DMD,
        (
            "euler step backwards",
            "mean = x + per_sample(sigma_next - sigma, x) * v",
            "mean = x + per_sample(sigma - sigma_next, x) * v",
        ),
        (
            "renoise mean of the old level",
            "mean = (1 - per_sample(sigma_next, x)) * x0\n",
            "mean = (1 - per_sample(sigma, x)) * x0\n",
        ),
        (
            "renoise noise of the old level",
            "mean + per_sample(sigma_next, x) * noise)",
            "mean + per_sample(sigma, x) * noise)",
        ),
        ("cps fresh and kept exchanged", "kept, fresh = math.cos(", "fresh, kept = math.cos("),
        ("sde noise without time", "total = std * torch.sqrt((sigma - sigma_next).to(std.dtype))", "total = std"),
        (
            "sde at the first level",
            "below = torch.where(sigma >= 1, torch.full_like(sigma, sigma_max), sigma)",
            "below = torch.where(sigma >= 1, torch.full_like(sigma, 0.5), sigma)",
        ),
        ("steps beyond the stop", "torch.nonzero(stop > k)", "torch.nonzero(stop >= k)"),
        (
            "next level one step on",
            "for i in (k, k + 1))\n        step =",
            "for i in (k, len(sigmas) - 1))\n        step =",
        ),
        ("wrong rows put back", "x.index_copy(0, index,", "x.index_copy(0, index.flip(0),"),
    ),
    *errors(
        "schedules.py",
        DMD + GDMD,
        ("groups not stratified", "    if stratify:", "    if False:"),
        (
            "renoise with levels exchanged",
            "return (1 - sigma) * x0 + sigma * eps",
            "return sigma * x0 + (1 - sigma) * eps",
        ),
        (
            "x0 of the wrong sign",
            "return x_sigma - per_sample(sigma, x_sigma) * velocity",
            "return x_sigma + per_sample(sigma, x_sigma) * velocity",
        ),
    ),
    *errors(
        "methods/refl.py",
        REFL + PARTS,
        ("refl against the reward", "short = -reward if", "short = reward if"),
        ("refl margin reversed", "torch.relu(self.margin - reward)", "torch.relu(reward - self.margin)"),
        ("refl margin ignored", "-reward if self.margin is None else", "-reward if True else"),
        ("refl weight ignored", "self.weight * short.mean()", "short.mean()"),
        ("refl at an earlier step", "step_index=self.steps - 1", "step_index=max(self.steps - 2, 0)"),
        ("refl at every step", "step_index=self.steps - 1", "step_index=None"),
        ("refl prompts of the wrong rows", "batch.prompts[rows]", "batch.prompts[:len(x)]"),
        ("refl share forgotten", "backward(share * loss)", "backward(loss)"),
        ("refl logs swapped", "loss=loss, reward_sample=reward.mean()", "reward_sample=loss, loss=reward.mean()"),
    ),
    *errors(
        "rewards/judge.py",
        GDMD + REFL + PARTS,
        ("decoding skipped", "images = self.family.decode(latents)", "images = latents"),
        (
            "prompts of the first part",
            "self._score(latents[rows], prompts[rows], rewards)",
            "self._score(latents[rows], prompts[: len(latents[rows])], rewards)",
        ),
        (
            "rewards scored whole",
            "len(latents), self.micro_batch_size",
            "len(latents), None",
        ),
    ),
    *errors(
        "roles/base.py",
        (*ROLES, "roles/test_copies.py", *DMD, *PARTS),
        ("through ignored", "(role == self.learner or through)", "(role == self.learner)"),
        ("all roles carry gradient", "(role == self.learner or through)", "True"),
        ("frozen weights get gradient", "weight.requires_grad_(False)", "weight.requires_grad_(True)"),
        (
            "guidance dropped in velocity",
            "predict_velocity(network, part.x, part.sigma, part.conditioning, guidance_scale)",
            "predict_velocity(network, part.x, part.sigma, part.conditioning)",
        ),
        (
            "x0 drops through",
            "adapter_scale=adapter_scale, through=through)\n        return latents",
            "adapter_scale=adapter_scale)\n        return latents",
        ),
        ("averages of every role move", "if spec.average_of == role:", "if spec.average_of:"),
        ("averages never move", "if spec.average_of == role:", "if False:"),
        ("learner not cleared", "self.learner = None\n            self._set", "self._set"),
        (
            "forwards not split",
            "len(latents), self.micro_batch_size",
            "len(latents), None",
        ),
    ),
    *errors(
        "roles/adapters.py",
        ROLES,
        (
            "adapter scale ignored",
            "self._under(None if role == TEACHER else role, adapter_scale)",
            "self._under(None if role == TEACHER else role, 1.0)",
        ),
        ("adapter scale kept", "layer.set_scale(previous, 1.0)", "pass"),
        (
            "teacher under an adapter",
            "None if role == TEACHER else role, adapter_scale",
            "'generator' if role == TEACHER else role, adapter_scale",
        ),
    ),
    *errors(
        "roles/copies.py",
        DMD,
        ("average decay reversed", "get_ema_multi_avg_fn(decay)", "get_ema_multi_avg_fn(1 - decay)"),
    ),
    *errors(
        "engines/base.py",
        DMD,
        (
            "average before the step",
            '            with phase("optimizer step"):',
            '            self.roles.update_averages(role)\n            with phase("optimizer step"):',
        ),
        ("average not moved", "        self.roles.update_averages(role)\n", ""),
        ("role never stepped", "self.step(role)", "pass"),
        ("gradient not dropped", "self.zero_grad(role)\n", "pass\n"),
    ),
    *errors(
        "engines/lightning.py",
        WIRING,
        ("clipping ignored", 'gradient_clip, "norm")', 'gradient_clip * 1e9, "norm")'),
        (
            "one role's clip for all",
            "self.roles.optimization_of(role).gradient_clip",
            "self.roles.optimization_of('generator').gradient_clip",
        ),
        (
            "generator's optimizer for all",
            "optimizer = self.optimizers[role]",
            "optimizer = self.optimizers['generator']",
        ),
        ("every step counted", "            self._counted = True", "            pass"),
        ("gradients pile up", "self.optimizers[role].zero_grad(set_to_none=True)", "pass"),
    ),
    *errors(
        "methods/lightning.py",
        WIRING,
        ("updates not counted", "self.updates += 1", "self.updates += 0"),
        ("schedules not stepped", "            schedule.step()", "            pass"),
        (
            "same noise in every update",
            "self.global_rank, self.updates, purpose, turn)",
            "self.global_rank, purpose, turn)",
        ),
        ("same noise on every rank", "stream(self.seed, self.global_rank, self", "stream(self.seed, self"),
        ("stream without turn", "self.updates, purpose, turn)", "self.updates, purpose)"),
        ("stream without purpose", "self.updates, purpose, turn)", "self.updates, turn)"),
        ("stream without seed", "return stream(self.seed, ", "return stream("),
        (
            "height and width exchanged",
            "self.family.latent_shape(self.height, self.width)",
            "self.family.latent_shape(self.width, self.height)",
        ),
        (
            "settings of the generator for all",
            "settings = self.roles.optimization_of(role)",
            "settings = self.roles.optimization_of('generator')",
        ),
        (
            "parameters of the generator for all",
            "settings.optimizer(self.roles.parameters_of(role))",
            "settings.optimizer(self.roles.parameters_of('generator'))",
        ),
        (
            "optimizers in reverse",
            "zip(self.roles.trained, _listed(self.optimizers())",
            "zip(self.roles.trained[::-1], _listed(self.optimizers())",
        ),
        ("updates not restored", 'self.updates = origin["updates"]', "pass"),
        ("updates not saved", "replace(self.provenance, updates=self.updates)", "self.provenance"),
        ("start_from ignored", "if self.start_from is not None:", "if False:"),
        ("record not handed on", 'None if done.record is None else {"record": done.record}', "None"),
        ("logs under another name", 'f"train/{name}": value', 'f"train/{name}": 0 * value'),
        (
            "embeddings of sorted prompts",
            "[prompt.text for prompt in batch.prompts]",
            "sorted(prompt.text for prompt in batch.prompts)",
        ),
    ),
    *errors(
        "methods/checkpointing.py",
        WIRING,
        ("average not taken over", 'if not found and spec.name != "generator":', 'if spec.name != "generator":'),
        ("followers not started", "roles.copy(str(spec.source), spec.name)", "pass"),
    ),
    *errors(
        "roles/spec.py",
        WIRING,
        ("warm-up ignored", "warmup = max(self.warmup, 1)", "warmup = 1"),
        ("warm-up one too long", "total_iters=warmup - 1", "total_iters=warmup"),
        ("weight decay ignored", "betas=self.betas, weight_decay=self.weight_decay", "betas=self.betas"),
        ("betas ignored", "betas=self.betas, weight_decay", "weight_decay"),
    ),
    *errors(
        "methods/record.py",
        GDMD,
        (
            "target and sample figures exchanged",
            '"reward_target": self.rewards.mean()',
            '"reward_target": self.rewards.mean() if self.sample_reward is None else self.sample_reward.mean()',
        ),
        ("reward spread over the batch", "self.rewards.std(1).mean() if", "self.rewards.std() if"),
        ("record's weight with lambda", "2 * self.lambda_policy", "self.lambda_policy"),
        ("share of positive weights", "(self.weight() < 0)", "(self.weight() > 0)"),
        (
            "share of worse targets",
            "self.rewards > self.sample_reward[:, None]",
            "self.rewards < self.sample_reward[:, None]",
        ),
        ("gradient figure is the spread", '"gradient": self.gradient.mean()', '"gradient": spread'),
        ("spread figure is the gradient", '"reward_spread": spread', '"reward_spread": self.gradient.mean()'),
    ),
    *errors(
        "families/base.py",
        ROLES + DMD,
        (
            "guidance reversed",
            "unconditional + guidance_scale * (conditional - unconditional)",
            "conditional + guidance_scale * (unconditional - conditional)",
        ),
        (
            "halves of guidance exchanged",
            "unconditional, conditional = v.chunk(2)",
            "conditional, unconditional = v.chunk(2)",
        ),
    ),
    *errors(
        "families/sd3.py",
        SIZES,
        ("sd3 height and width", "height // factor, width // factor", "width // factor, height // factor"),
    ),
    *errors(
        "families/sdxl.py",
        SIZES,
        ("sdxl size exchanged", "for side in x_sigma.shape[2:]]", "for side in x_sigma.shape[:1:-1]]"),
    ),
    *errors(
        "data/prompt_data.py",
        WIRING,
        ("data rank not passed on", "rank=0 if self.trainer is None else self.trainer.global_rank", "rank=0"),
        (
            "data world size not passed on",
            "world_size=1 if self.trainer is None else self.trainer.world_size,\n            start",
            "world_size=1,\n            start",
        ),
    ),
    *errors(
        "data/stream.py",
        (*WIRING, "data/test_stream.py"),
        ("rank ignored", "[self.rank :: self.world_size]", "[0 :: self.world_size]"),
    ),
    *errors("prompts.py", WIRING + GDMD, ("groups of the wrong size", "// self.group_size", "% self.group_size")),
    *errors(
        "latents.py",
        GDMD + PARTS,
        ("conditioning repeated as a block", "t.repeat_interleave(times, dim=0))", "torch.cat([t] * times))"),
        (
            "levels of the first rows",
            "NoisyLatents(self.x[rows], self.sigma[rows],",
            "NoisyLatents(self.x[rows], self.sigma[:len(self.x[rows])],",
        ),
        ("last micro-batch left out", "range(0, rows, step)", "range(0, rows - rows % step or rows, step)"),
    ),
]
