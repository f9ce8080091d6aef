"""The sentences of docs/every-phone-and-computer.md; simulations.question fills in the figures."""

PAGE = """# What could every phone and computer train?

*Made by `manyhands simulate question --out docs/every-phone-and-computer.md`; every figure is computed by it, from
`simulations/world` and `simulations/estimate.py`. An estimate, not a measurement: nobody has run this.*

**Short answer.** With the system as it is, small language models, soon: see the table. More people do not help for
long. A few hundred fast computers at a time are as many as a model of this size can use; beyond them the rest wait in
reserve for those who leave. What stops a *larger* model is memory: whoever trains must hold all of it.

{table}

Time until the model has seen {tokens_per_parameter} tokens a parameter (Hoffmann et al. 2022), by how many phones and
computers have joined; in brackets the 5th to 95th percentile when all uncertain assumptions vary at once.
"never": in more than one case of twenty no device that is online can hold the model.

![Days by peers and model](every-phone-and-computer-days.svg)

## Where the limit is
With ten million joined, the best choice of devices, codec, H and groups for each model:

{together}

![What the time goes into](every-phone-and-computer-limits.svg)

- **Memory.** Training takes 20 bytes a parameter here. Of all phones and computers these can hold the model:
  {fits}. manyhands does not split a model over machines.
- **Batch size.** With 100,000 joined, {middle_online} of the {middle_able} suitable devices online do {middle_batch}
  tokens a step of the 100 M model; its critical batch is {middle_critical}. There a run needs twice the data for a
  given loss, and more devices hardly shorten it: (S/S_min - 1)(E/E_min - 1) = 1 (McCandlish et al. 2018), with
  S_min = D / B_crit and B_crit = 22.9 D^0.47 tokens (Zhang et al. 2024).
- **Exchange and waiting.** {exchange_share} of the {middle_days} for that model. A round waits for its slowest
  contributor's computing and uplink; then each peer fetches every payload, or every group's, and at most 32 named peers
  pass them on (here seeds in data centres, 8 Gbit/s each). How many rounds there must be follows from the critical
  batch and H: D / B_crit / H at least. So a larger critical batch, or longer rounds, shorten what is shown as exchange.
- **Availability.** Half to nine tenths are offline at any moment. What a peer did while it waited for its turn is lost
  when its session ends; so a run does best with about as many peers as may contribute to a round, and the others in
  reserve.
- **Phones.** A typical phone computes {phone_ratio} times as slowly as a gaming card, holds a third of the model, and
  sets the pace of a round in which it is the typical peer. With 100,000 joined:

{phones}

## What codec and H change
100,000 joined, 100 M parameters; with every codec, and with every H for `sign`, as many devices as then help.

{codecs}

{steps}

The losses are those of `protocol/policy.py`: measured here on byte-level models of 0.13 and 0.39 M parameters with 3
and 8 workers ([convergence.md](convergence.md)), one seed. The estimates above allow {bearable} nats for codec and H
together. Published runs of larger models see less: DiLoCo with 8 workers was on par with synchronous training
(Douillard et al. 2023), MuLoCo's pseudo-gradients stand two bits, and SparseLoCo with 1/64 of the values ended below
full-precision DiLoCo. If that holds here, the rows with few bytes and long rounds are nearer the truth.

## What is assumed
{devices}

Shares of all phones and computers: 4.7 billion people use a smartphone (GSMA, The Mobile Economy 2025); Microsoft
counts 1.4 billion Windows devices; 132 million play on Steam in a month (Valve 2021). Throughput is what training gets
out of a device, not its peak. Its sources, and those of memory, lines (Ookla, FCC, Ofcom) and hours online (BOINC,
Bonawitz et al. 2019), stand in `simulations/world`. 6 operations a parameter and token (Kaplan et al. 2020).

## How sure it is
![One assumption at a time](every-phone-and-computer-unsure.svg)

The ranges in the first table vary all of these at once, each log-uniform by itself. Below, the formula beside fidelity
`plan`, which plays every round of a day (30 M parameters, `sign`, H = 20, at most 128 contributors, everybody takes
part, 32 seeds). The formula knows no peers that fall behind while they fetch, so it is the optimistic one:

{checks}

## What might be changed, and what it would give
One million joined:

{unbuilt}

## What is not known
- Whether hundreds of workers with few bits and tens of inner steps learn as the penalties say: the largest run here had
  eight. The critical batch size is known for synchronous steps, not for local ones.
  The fit's coefficient (22.9) was not compared with the paper's own text.
- What the formula leaves out: activations (memory), heat and batteries, people who stop when they notice, attackers and
  the redundancy against them, who pays for the seeds, where the text comes from, and whether its tokens may be shown
  twice.
- Whether phones can train at all for hours: their throughput is the assumption with the widest range, and no
  measurement of ours stands behind it.
"""
