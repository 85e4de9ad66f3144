//! Whole simulated fleets from seeds: every invariant with faults, the same report twice, stretches that change nothing,
//! and cost models beside published figures.
//!
//! ```text
//! cargo test --test simulate                                  all seeds
//! SIMULATE_SEEDS=5000 cargo test --release --test simulate every_seed
//! SIMULATE_SEED=17 cargo test --test simulate every_seed      one seed again
//! ```

#![allow(clippy::unwrap_used)]

use neurond::simulate::cost::{Cost, PRESETS, Work, preset};
use neurond::simulate::report::{Lack, Report};
use neurond::simulate::traffic::{PROFILES, profile};
use neurond::simulate::{Faults, Setup, run};

/// Seeds of an ordinary run.
const SEEDS: u64 = 150;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

fn play(setup: &Setup) -> Report {
    run(setup, &mut |_| ()).unwrap_or_else(|error| panic!("{error}"))
}

/// A number of its own for each seed and purpose.
fn draw(seed: u64, purpose: u64, from: &[f64]) -> f64 {
    let mixed = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ purpose.wrapping_mul(0xd134_2543_de82_ef95);
    let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    from[((mixed >> 33) % from.len() as u64) as usize]
}

/// A small and troubled fleet: devices that hold a few sequences, short lives, bursts, impatient callers.
fn troubled(seed: u64) -> Setup {
    let profile = &PROFILES[(seed % PROFILES.len() as u64) as usize];
    let mut setup = Setup::new(preset("h200-llama-70b-fp8").unwrap(), profile, 1 + (seed % 4) as usize);
    let pick = |purpose, from: &[f64]| draw(seed, purpose, from);
    setup.seed = seed;
    setup.duration_s = 40.0;
    setup.request_timeout_s = pick(1, &[3.0, 10.0, 600.0]);
    setup.check_every = 1;
    setup.engine.context = pick(2, &[150.0, 400.0, 900.0]) as usize;
    setup.engine.step_tokens = pick(3, &[8.0, 33.0, 128.0]) as usize;
    setup.engine.prefill_chunk = pick(4, &[5.0, 32.0, 128.0]) as usize;
    setup.engine.max_running = pick(5, &[1.0, 4.0, 16.0]) as usize;
    setup.engine.max_queue = pick(6, &[2.0, 10.0, 100.0]) as usize;
    setup.engine.block_tokens = pick(7, &[1.0, 4.0, 16.0]) as usize;
    setup.engine.prefill_stretch = pick(16, &[0.0, 1.7]);
    setup.engine.prefix_cache = pick(8, &[0.0, 1.0, 1.0]) > 0.0;
    // Room for half of the longest sequence to six of them.
    let tokens = setup.engine.context as f64 * pick(9, &[0.5, 1.5, 3.0, 6.0]);
    let pool = tokens.max(64.0) * setup.cost.kv_bytes_per_token;
    setup.cost.memory_bytes = setup.cost.weight_bytes + setup.cost.reserved_bytes + pool;
    setup.shape.rate = pick(10, &[1.0, 3.0, 8.0]) * setup.devices as f64;
    setup.shape.clients = pick(11, &[0.0, 0.0, 3.0]) as usize;
    setup.shape.flood = pick(12, &[0.0, 0.2, 0.6]);
    setup.shape.accounts = 4;
    setup.shape.systems = 3;
    setup.shape.system_tokens = 20.0;
    setup.shape.prompt_tokens = 30.0;
    setup.shape.output_tokens = 25.0;
    setup.shape.think_s = 1.0;
    setup.shape.leaves = 0.1;
    setup.shape.patience_s = 2.0;
    setup.faults = Faults {
        death_every_s: pick(13, &[0.0, 10.0, 40.0]),
        repair_s: 2.0,
        slow_every_s: pick(14, &[0.0, 15.0]),
        slow_for_s: 3.0,
        slow_factor: 4.0,
        vanish: 0.1,
        kv_missing: pick(15, &[0.0, 0.3]),
    };
    setup
}

#[test]
fn every_seed_keeps_its_books_and_stretches_change_nothing() {
    if let Some(seed) = number("SIMULATE_SEED") {
        let report = play(&troubled(seed));
        return println!("{:#}", report.json());
    }
    let seeds = number("SIMULATE_SEEDS").unwrap_or(SEEDS);
    let mut seen = [0u64; 10];
    for seed in 0..seeds {
        let stretched = troubled(seed);
        // Step by step, and on several threads.
        let single = Setup { coasts: false, threads: 2 + seed as usize % 3, ..stretched.clone() };
        let outcome = std::panic::catch_unwind(|| (run(&stretched, &mut |_| ()), run(&single, &mut |_| ())));
        let (one, other) = match outcome {
            Ok((Ok(one), Ok(other))) => (one, other),
            Ok((one, other)) => panic!("seed {seed}: {:?} {:?}", one.err(), other.err()),
            Err(_) => panic!("seed {seed} panicked: SIMULATE_SEED={seed} cargo test --test simulate every_seed"),
        };
        assert_eq!(one.json().to_string(), other.json().to_string(), "seed {seed}: stretches changed the report");
        let lacks = |lack| one.tally.lacking.get(&lack).copied().unwrap_or(0);
        let happened = [
            one.tally.done,
            one.tally.preemptions,
            one.tally.cached_tokens,
            one.tally.retried,
            lacks(Lack::Busy),
            lacks(Lack::Late),
            lacks(Lack::Lost) + lacks(Lack::Unavailable),
            lacks(Lack::Left),
            one.tally.made_way,
            one.tally.followed,
        ];
        seen.iter_mut().zip(happened).for_each(|(seen, happened)| *seen += happened);
    }
    println!("{seeds} seeds: done, preempted, cached, retried, busy, late, lost, left, made way, followed: {seen:?}");
    // The seeds are worth something only if everything happens in them.
    assert!(seeds < SEEDS || seen.iter().all(|&count| count >= 20), "{seen:?}");
}

#[test]
fn any_number_of_threads_gives_the_same_report() {
    let day = |threads| {
        let mut setup = Setup::new(&PRESETS[3], &PROFILES[2], 24);
        setup.faults = Faults { death_every_s: 600.0, slow_every_s: 600.0, ..Faults::BAD_DAY };
        (setup.duration_s, setup.threads, setup.shape.affinity) = (900.0, threads, 0.5);
        play(&setup).json().to_string()
    };
    let alone = day(1);
    for threads in [2, 3, 24] {
        assert_eq!(day(threads), alone, "on {threads} threads");
    }
}

#[test]
fn the_same_seed_gives_the_same_report_and_another_seed_another() {
    let day = |seed| {
        let mut setup = Setup::new(&PRESETS[3], &PROFILES[0], 3);
        setup.faults = Faults { death_every_s: 600.0, ..Faults::BAD_DAY };
        (setup.duration_s, setup.seed) = (1_200.0, seed);
        play(&setup).json().to_string()
    };
    assert_eq!(day(5), day(5));
    assert_ne!(day(5), day(6));
}

/// So many callers that ask again at once, all with prompts and answers of these lengths.
fn closed_loop(device: &str, clients: usize, prompt: f64, output: f64, seconds: f64) -> Report {
    let mut setup = Setup::new(preset(device).unwrap(), profile("batch").unwrap(), 1);
    (setup.shape.rate, setup.shape.clients, setup.duration_s) = (0.0, clients, seconds);
    (setup.shape.prompt_tokens, setup.shape.prompt_sigma) = (prompt, 0.0);
    (setup.shape.output_tokens, setup.shape.output_sigma) = (output, 0.0);
    setup.shape.system_tokens = 0.0;
    setup.engine.max_queue = 10_000;
    // As those engines do: a step's budget is all that bounds prompts.
    setup.engine.prefill_stretch = 0.0;
    setup.engine.context = setup.engine.context.max((prompt + output) as usize);
    play(&setup)
}

#[track_caller]
fn about(what: &str, value: f64, published: f64, tolerance: f64) {
    println!("{what}: {value:.1}, published {published}");
    assert!((value / published - 1.0).abs() <= tolerance, "{what} is {value}, published is {published}");
}

#[test]
fn steps_take_as_long_as_bandwidth_and_arithmetic_say() {
    let bare = |name: &str| Cost { step_overhead_us: 0.0, token_overhead_us: 0.0, ..preset(name).unwrap().cost };
    let ms = |cost: Cost, work: Work| cost.step_ns(work) as f64 / 1e6;
    let fp8 = bare("h100-llama-8b-fp8");
    let bf16_kv = Cost { kv_bytes_per_token: 131_072.0, ..fp8 };
    for (sequences, expected) in [(64, [6.9, 4.8]), (256, [19.5, 11.1])] {
        let work = Work::decode(sequences, sequences * 1500);
        about("8B fp8 decode, bf16 KV", ms(bf16_kv, work), expected[0], 0.02);
        about("8B fp8 decode, fp8 KV", ms(fp8, work), expected[1], 0.02);
    }
    for (name, tokens_per_s) in [
        ("h100-llama-8b-bf16", 200.0),
        ("h100-llama-8b-fp8", 374.0),
        ("h100-llama-8b-int4", 645.0),
        ("2xh100-llama-70b-fp8", 85.0),
        ("h200-llama-70b-fp8", 61.0),
        ("h100-llama-70b-int4", 80.0),
    ] {
        about(name, 1e3 / ms(bare(name), Work::decode(1, 1)), tokens_per_s, 0.02);
    }
    let mut thousand = Work::default();
    thousand.add(0, 1000);
    let at = |cost: Cost, flops_per_s| ms(Cost { flops_per_s, attention_flops: 0.0, ..cost }, thousand);
    about("8B prefill of 1000", at(fp8, 798e12), 19.0, 0.03);
    about("70B prefill of 1000", at(bare("h200-llama-70b-fp8"), 798e12), 174.0, 0.03);
    about("70B prefill of 1000 on two", at(bare("2xh100-llama-70b-fp8"), 2.0 * 1400e12), 50.0, 0.03);
}

#[test]
fn presets_serve_as_fast_as_published_engines() {
    let single = closed_loop("h100-llama-8b-bf16", 1, 128.0, 512.0, 60.0);
    about("SGLang, 8B bf16, H100, one stream, tok/s", 1e3 / single.tally.itl.mean_ms(), 158.0, 0.05);
    // NIM 1.8, 70B fp8 on two H100, 5000 tokens in, 500 out.
    for (clients, ttft_ms, itl_ms) in [(1, 407.0, 18.6), (25, 689.0, 38.8), (50, 835.0, 59.7)] {
        let report = closed_loop("2xh100-llama-70b-fp8", clients, 5_000.0, 500.0, 400.0);
        about("NIM, 70B, between tokens, ms", report.tally.itl.mean_ms(), itl_ms, 0.2);
        // How long a prompt waits for others depends on the policy; the order of magnitude does not.
        about(
            "NIM, 70B, to the first token, ms",
            report.tally.ttft.ms(0.5),
            ttft_ms,
            if clients == 1 { 0.15 } else { 1.0 },
        );
    }
    // TensorRT-LLM 1.0, offline.
    for (device, clients, prompt, output, published) in [
        ("h100-llama-8b-fp8", 512, 1_000.0, 1_000.0, 15_220.0),
        ("h100-llama-8b-fp8", 512, 128.0, 128.0, 28_312.0),
        ("2xh100-llama-70b-fp8", 256, 1_000.0, 1_000.0, 4_205.0),
        ("h200-llama-70b-fp8", 256, 1_000.0, 1_000.0, 2_909.0),
    ] {
        let report = closed_loop(device, clients, prompt, output, 200.0);
        about(
            &format!("TensorRT-LLM, {device}, {prompt}/{output}, tok/s"),
            report.per_s(report.tally.produced()),
            published,
            0.3,
        );
    }
    // This repository's own measurements, docs/PERFORMANCE.md.
    for (clients, published) in [(1, 179.0), (4, 392.0), (16, 560.0), (32, 631.0), (64, 695.0)] {
        let report = closed_loop("cpu-smollm2-135m", clients, 128.0, 128.0, 120.0);
        about("SmolLM2 on two cores, tok/s", report.per_s(report.tally.produced()), published, 0.3);
    }
}

#[test]
fn a_flood_of_one_account_hardly_slows_the_others() {
    let ttft_p90 = |flood: f64| {
        let mut setup = Setup::new(preset("h200-llama-70b-fp8").unwrap(), profile("chat").unwrap(), 1);
        setup.duration_s = 3_600.0;
        setup.engine.max_running = 16;
        // Others ask as often with it as without it; in its bursts the flood is far more than the device can do.
        setup.shape.rate = 0.4 / (1.0 - flood);
        setup.shape.flood = flood;
        let report = play(&setup);
        let others: Vec<_> = report.tally.accounts.iter().filter(|account| account.name != "flood").collect();
        let flooded = report.tally.accounts.iter().find(|account| account.name == "flood");
        let mean = others.iter().map(|account| account.ttft.ms(0.9)).sum::<f64>() / others.len() as f64;
        (mean, flooded.map_or(0.0, |account| account.ttft.ms(0.9)))
    };
    let ((calm, _), (flooded, flood_itself)) = (ttft_p90(0.0), ttft_p90(0.5));
    println!("others {calm:.0} ms without, {flooded:.0} ms with a flood that waits {flood_itself:.0} ms itself");
    assert!(flood_itself > 4.0 * flooded, "the flood does not even wait: {flood_itself} ms, others {flooded} ms");
    assert!(flooded < calm + 1_500.0, "{flooded} ms instead of {calm}");
}

#[test]
fn affinity_finds_more_in_the_cache_and_a_small_pool_preempts() {
    let day = |name: &str, value: &str| {
        let mut setup = Setup::new(preset("h200-llama-70b-fp8").unwrap(), profile("agent").unwrap(), 4);
        setup.duration_s = 1_800.0;
        setup.set("affinity", "1").unwrap();
        setup.set(name, value).unwrap();
        play(&setup)
    };
    let (with, without) = (day("affinity", "1").hit_rate(), day("affinity", "0").hit_rate());
    assert!(with > without + 0.05, "{with} with affinity, {without} without");
    assert_eq!(day("prefix_cache", "false").tally.cached_tokens, 0);
    let (large, small) = (day("kv_missing", "0"), day("kv_missing", "0.97"));
    assert_eq!(large.tally.preemptions, 0);
    assert!(small.tally.preemptions > 0 && small.tally.recomputed_rows > 0);
    assert!(small.hit_rate() < large.hit_rate());
}
