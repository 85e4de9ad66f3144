//! Drives the real scheduler, block manager, sampler and delivery from seeds, without threads or clocks: random arrivals,
//! lengths, shared prefixes, drafts that come true or not, choices, stop strings, priorities, accounts, cancels, deadlines,
//! a tiny KV pool, now and then a device that fails. The simulated device checks every cell of KV that it would read.
//!
//! ```text
//! cargo test --test sim                          all seeds
//! SIM_SEED=17 cargo test --test sim              one seed again, with its story on stderr
//! SIM_SEEDS=100000 cargo test --release --test sim
//! ```

mod world;

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use neurond::base::Kind;
use neurond::metrics::EngineMetrics;
use neurond::task::FinishReason;

use world::{Answer, Request, Rng, STEP, World, WorldSpec};

/// Seeds of an ordinary run.
const SEEDS: u64 = 400;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

#[test]
fn every_seed_ends_well() {
    if let Some(seed) = number("SIM_SEED") {
        let tally = play(seed, true).unwrap();
        return eprintln!("{tally:?}");
    }
    let seeds = number("SIM_SEEDS").unwrap_or(SEEDS);
    let mut total = Tally::default();
    for seed in 0..seeds {
        let outcome = std::panic::catch_unwind(|| play(seed, false)).unwrap_or_else(|_| Err("it panicked".into()));
        match outcome {
            Ok(tally) => total.add(&tally),
            Err(error) => panic!(
                "seed {seed}: {error}\nrun it again with: SIM_SEED={seed} cargo test --test sim every_seed -- --nocapture"
            ),
        }
    }
    println!("{seeds} seeds: {total:?}");
    // The seeds are worth something only if everything happens in them.
    assert!(seeds < SEEDS || total.least() >= 100, "{total:?}");
}

/// One seed from the first arrival to the last answer.
fn play(seed: u64, aloud: bool) -> Result<Tally, String> {
    let mut rng = Rng::new(seed);
    let spec = WorldSpec::random(&mut rng);
    let requests: Vec<Request> = (0..rng.within(3, 40)).map(|_| Request::random(&mut rng, &spec)).collect();
    if aloud {
        eprintln!("{spec:#?}\n{requests:#?}");
    }
    let mut world = World::new(spec);
    // Each step computes at least one row, and a row is computed again only when somebody else was given its block.
    let tokens: usize = requests
        .iter()
        .map(|request| request.choices as usize * (request.prompt.len() + request.max_tokens as usize))
        .sum();
    let bound = 20 * tokens + 1_000;
    let answers = world.play(&requests, bound, aloud)?;
    let mut alone = HashMap::new();
    for (at, (request, answer)) in requests.iter().zip(&answers).enumerate() {
        judge(&world, request, answer, &mut alone).map_err(|error| format!("request {at}: {error}"))?;
    }
    world.is_empty()?;
    Ok(Tally::of(&world, &requests, &answers))
}

/// How often what happened.
#[derive(Default, Debug)]
struct Tally(BTreeMap<&'static str, u64>);

impl Tally {
    fn of(world: &World, requests: &[Request], answers: &[Answer]) -> Self {
        let count = |is: &dyn Fn(&Answer) -> bool| answers.iter().filter(|answer| is(answer)).count() as u64;
        let failed = |kind: Kind| count(&|answer: &Answer| answer.failed == Some(kind));
        let ended_by = |is: fn(&(FinishReason, Option<String>)) -> bool| {
            let choices = requests
                .iter()
                .zip(answers)
                .flat_map(|(request, answer)| (0..request.choices).map(move |choice| answer.finish(choice)));
            choices.flatten().filter(|finish| is(finish)).count() as u64
        };
        Self(BTreeMap::from([
            ("done", count(&|answer| answer.done.is_some())),
            ("cached", count(&|answer| answer.done.is_some_and(|usage| usage.cached_tokens > 0))),
            ("preempted", world.metrics.preemptions.get()),
            ("made way", world.metrics.made_way.get()),
            ("spilled", world.metrics.spill_stored.get()),
            ("fetched", world.metrics.spill_hits.get()),
            ("followed", world.metrics.followed.get()),
            ("accepted", world.metrics.accepted_tokens.get()),
            ("rejected", world.metrics.drafted_tokens.get() - world.metrics.accepted_tokens.get()),
            ("cancelled", world.metrics.cancelled.get()),
            ("busy", failed(Kind::Busy)),
            ("too long", failed(Kind::ContextLength)),
            ("late", failed(Kind::Timeout)),
            ("lost", failed(Kind::EngineLost)),
            ("end token", ended_by(|finish| *finish == (FinishReason::Stop, None))),
            ("stop string", ended_by(|finish| finish.1.is_some())),
            ("length", ended_by(|finish| finish.0 == FinishReason::Length)),
        ]))
    }

    fn add(&mut self, other: &Self) {
        other.0.iter().for_each(|(what, count)| *self.0.entry(what).or_default() += count);
    }

    fn least(&self) -> u64 {
        self.0.values().min().copied().unwrap_or(0)
    }
}

/// What was said, whenever it was: each choice on its own, and what is billed.
fn said(request: &Request, answer: &Answer) -> String {
    let billed = answer.done.map(|usage| (usage.prompt_tokens, usage.completion_tokens));
    let choices = (0..request.choices).map(|choice| format!("{:?} {:?}", answer.text(choice), answer.finish(choice)));
    format!("{} {billed:?} {:?} {:?}", choices.collect::<Vec<_>>().join(" | "), answer.failed, answer.prompt)
}

/// Plays the same with answers written between the steps and beside them. A crowd hears the same, if not at the same
/// time, since places come free a step later behind a stop string; whoever is alone hears the same to the last event.
fn check_scribe(spec: &WorldSpec, requests: &[Request], least: usize, tally: &mut [u64; 3]) -> Result<(), String> {
    let play = |requests: &[Request]| -> [Result<(Vec<Answer>, EngineMetrics), String>; 2] {
        let worlds = [World::new(spec.clone()), World::new(spec.clone()).with_scribe(least)];
        worlds.map(|mut world| {
            let answers = world.play(requests, 100_000, false)?;
            world.is_empty()?;
            Ok((answers, world.metrics))
        })
    };
    let [here, beside] = play(requests);
    let ((here, before), (beside, metrics)) = (here?, beside?);
    for (at, (request, (here, beside))) in requests.iter().zip(here.iter().zip(&beside)).enumerate() {
        let (expected, heard) = (said(request, here), said(request, beside));
        if expected != heard {
            return Err(format!("request {at} heard {heard}, not {expected}"));
        }
        tally[0] += (0..request.choices)
            .filter(|&choice| here.finish(choice).is_some_and(|end| end.1.is_some()))
            .count() as u64;
    }
    let counts = |of: &EngineMetrics| {
        (
            of.generation_tokens.get(),
            of.finished_stop.get(),
            of.finished_length.get(),
            of.inter_token.get_sample_count(),
        )
    };
    if counts(&before) != counts(&metrics) || metrics.cancelled.get() > 0 {
        return Err(format!("{:?} were counted, not {:?}", counts(&metrics), counts(&before)));
    }
    tally[1] += metrics.accepted_tokens.get();
    tally[2] += metrics.scribe_wait.get_sample_count();
    for request in requests.iter().filter(|request| request.choices == 1) {
        let alone = Request { step: 0, ..request.clone() };
        let [expected, heard] =
            play(&[alone]).map(|outcome| outcome.map(|(answers, _)| format!("{:?}", answers[0].events)));
        if expected != heard {
            return Err(format!("alone {heard:?} was heard, not {expected:?}"));
        }
    }
    Ok(())
}

#[test]
fn answers_written_beside_the_device_are_those_written_between_its_steps() {
    // Stop strings, drafts that came true, steps that waited.
    let mut tally = [0; 3];
    for seed in 0..number("SIM_SEEDS").unwrap_or(150) {
        let mut rng = Rng::new(!seed);
        // Nothing that depends on when something is heard.
        let spec = WorldSpec { fail_at: 0, max_queue: 1_000, ..WorldSpec::random(&mut rng) };
        let often = ["e", "t", " ", "ta", "he", "zj", "q", "eta", "o "];
        let one = |rng: &mut Rng| Request {
            stop: (0..rng.within(0, 2)).map(|_| rng.pick(&often).to_owned()).collect(),
            leaves: None,
            deadline: None,
            ..Request::random(rng, &spec)
        };
        let requests: Vec<Request> = (0..rng.within(1, 12)).map(|_| one(&mut rng)).collect();
        // All of it is written beside the device, or some of it.
        let least = rng.pick(&[1, 1, 3]);
        check_scribe(&spec, &requests, least, &mut tally).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
    println!("{tally:?}");
    assert!(tally[0] > 100 && tally[1] > 100, "{tally:?}");
}

#[test]
fn a_scribe_that_is_slow_holds_the_device_up_and_loses_nothing() {
    let mut tally = [0; 3];
    let mut rng = Rng::new(5);
    // Each byte is held against thousands of strings, which takes longer than a step.
    let stop: Vec<String> = (0..10_000).map(|at| format!("never {at}")).chain(["ee".to_owned()]).collect();
    let spec = WorldSpec { blocks: 256, drafts: (4, 16), period: 7, ..roomy() };
    let requests: Vec<Request> = (0..4)
        .map(|at| Request {
            stop: stop.clone(),
            logprobs: Some(1),
            max_tokens: 60,
            seed: at,
            kind: (at % 3) as u8,
            ..request(at as u8, 0, rng.within(0, 9) as usize)
        })
        .collect();
    check_scribe(&spec, &requests, 1, &mut tally).unwrap();
    assert!(tally[2] > 20, "it was not slow: {tally:?}");
}

/// What may come of a request, given what it was.
fn judge(world: &World, request: &Request, answer: &Answer, alone: &mut HashMap<Alone, Answer>) -> Result<(), String> {
    match answer.failed {
        Some(Kind::Busy) => return answer.is_blank().then_some(()).ok_or("a refused request got text".into()),
        Some(Kind::ContextLength) if request.prompt.len() >= world.context() => return Ok(()),
        Some(Kind::Timeout) if request.deadline.is_some() => {}
        Some(Kind::EngineLost) if world.spec.fail_at > 0 => {}
        None if answer.done.is_some() || request.leaves.is_some() => {}
        other => return Err(format!("ended with {other:?}, done: {:?}", answer.done)),
    }
    for choice in 0..request.choices {
        let key = (
            request.prompt.clone(),
            request.max_tokens,
            request.seed + u64::from(choice),
            request.kind,
            request.stop.clone(),
            request.adapter,
            request.prompt_logprobs,
        );
        let expected = alone.entry(key).or_insert_with(|| world.alone(request, choice));
        let (text, whole) = (answer.text(choice), expected.text(0));
        if answer.finish(choice).is_some() && (text != whole || answer.finish(choice) != expected.finish(0)) {
            return Err(format!(
                "choice {choice} is {text:?} {:?}, alone it is {whole:?} {:?}",
                answer.finish(choice),
                expected.finish(0)
            ));
        }
        if !whole.starts_with(text) {
            return Err(format!("choice {choice} began {text:?}, alone it is {whole:?}"));
        }
        if let Some(prompt) = &answer.prompt
            && Some(prompt) != expected.prompt.as_ref()
        {
            return Err(format!("of the prompt {prompt:?} is known, alone {:?}", expected.prompt));
        }
        if answer.done.is_some() && answer.finish(choice).is_none() {
            return Err(format!("choice {choice} has no end"));
        }
    }
    let Some(usage) = answer.done else { return Ok(()) };
    let produced: u32 = (0..request.choices)
        .map(|choice| {
            let key = (
                request.prompt.clone(),
                request.max_tokens,
                request.seed + u64::from(choice),
                request.kind,
                request.stop.clone(),
                request.adapter,
                request.prompt_logprobs,
            );
            alone[&key].done.map_or(0, |usage| usage.completion_tokens)
        })
        .sum();
    if usage.prompt_tokens as usize != request.prompt.len() || usage.completion_tokens != produced {
        return Err(format!("usage {usage:?}, alone {produced} tokens"));
    }
    if request.prompt_logprobs.is_some() && usage.cached_tokens > 0 {
        return Err("a prompt that is looked at came out of the cache".into());
    }
    if usage.accepted_tokens > usage.drafted_tokens
        || usage.accepted_tokens > usage.completion_tokens
        || usage.drafted_tokens > 0 && (world.spec.drafts.0 == 0 || request.drafts == Some(0))
    {
        return Err(format!("usage {usage:?}"));
    }
    if usage.cached_tokens >= usage.prompt_tokens || !world.spec.prefix_cache && usage.cached_tokens > 0 {
        return Err(format!("usage {usage:?}"));
    }
    Ok(())
}

/// Whatever an answer depends on.
type Alone = (Vec<u32>, u32, u64, u8, Vec<String>, Option<u64>, Option<u32>);

fn roomy() -> WorldSpec {
    WorldSpec {
        blocks: 64,
        block_tokens: 4,
        context: 200,
        step_tokens: 16,
        prefill_chunk: 16,
        max_running: 4,
        max_queue: 1_000,
        prefix_cache: true,
        prefill_stretch: 0.0,
        spill: 0,
        end_in: 0,
        fail_at: 0,
        drafts: (0, 0),
        draft: None,
        period: 0,
    }
}

fn request(account: u8, priority: i8, step: usize) -> Request {
    Request {
        step,
        account,
        priority,
        prompt: (0..8).map(|at| u32::from(account) + at).collect(),
        choices: 1,
        max_tokens: 8,
        seed: 0,
        kind: 0,
        stop: vec![],
        salt: 0,
        logprobs: None,
        adapter: None,
        prompt_logprobs: None,
        drafts: None,
        expected: vec![],
        leaves: None,
        deadline: None,
    }
}

#[test]
fn a_flood_of_one_account_does_not_starve_another() {
    // Account 0 asks for far more than there is room for; account 1 asks once in a while.
    let mut requests: Vec<Request> = (0..300).map(|_| request(0, 0, 0)).collect();
    let light: Vec<usize> = (0..10).map(|round| 20 + 20 * round).collect();
    requests.extend(light.iter().map(|&step| request(1, 0, step)));
    let mut world = World::new(roomy());
    let answers = world.play(&requests, 10_000, false).unwrap();
    let flood_took = answers[..300].iter().map(|answer| answer.ended).max().unwrap();
    assert!(flood_took > 500, "no flood: {flood_took} steps");
    for (answer, asked) in answers[300..].iter().zip(light) {
        // One of four places comes free about every two steps, and an answer takes eight.
        assert!(answer.ended - asked <= 30, "asked at {asked}, answered at {}", answer.ended);
    }
}

#[test]
fn a_flood_of_long_answers_does_not_keep_others_out_of_the_batch() {
    // Every place is taken, and for a long time; whoever asks for little is let in at once all the same.
    let mut requests: Vec<Request> =
        (0..40).map(|at| Request { max_tokens: 150, seed: at, ..request(0, 0, 0) }).collect();
    let light: Vec<usize> = (0..10).map(|round| 20 + 20 * round).collect();
    requests.extend(light.iter().map(|&step| request(1, 0, step)));
    let mut world = World::new(roomy());
    let answers = world.play(&requests, 10_000, false).unwrap();
    let flood_took = answers[..40].iter().map(|answer| answer.ended).max().unwrap();
    assert!(flood_took > 1_000 && answers.iter().all(|answer| answer.done.is_some()), "{flood_took} steps");
    for (answer, asked) in answers[40..].iter().zip(light) {
        // An answer takes eight steps.
        assert!(answer.ended - asked <= 12, "asked at {asked}, answered at {}", answer.ended);
    }
}

#[test]
fn a_flood_that_fills_the_pool_does_not_keep_others_out_of_it() {
    let prompt = |at: u32| (0..40).map(|token| at * 7 + token).collect();
    let flood = |at| Request { max_tokens: 150, prompt: prompt(at), ..request(0, 0, 0) };
    let mut requests: Vec<Request> = (0..20).map(flood).collect();
    let light: Vec<usize> = (0..5).map(|round| 40 + 40 * round).collect();
    requests.extend(light.iter().map(|&step| Request { prompt: (100..130).collect(), ..request(1, 0, step) }));
    let mut world = World::new(WorldSpec { max_running: 16, ..roomy() });
    let answers = world.play(&requests, 10_000, false).unwrap();
    assert!(answers.iter().all(|answer| answer.done.is_some()));
    for (answer, asked) in answers[20..].iter().zip(light) {
        assert!(answer.ended - asked <= 20, "asked at {asked}, answered at {}", answer.ended);
    }
}

#[test]
fn a_low_priority_is_served_under_a_flood_of_higher_ones() {
    // High priority alone keeps every place taken for the whole time.
    let mut requests: Vec<Request> = (0..400).map(|at| request((at % 3) as u8, 3, at / 2)).collect();
    requests.push(request(9, -2, 5));
    let mut world = World::new(WorldSpec { max_running: 1, ..roomy() });
    let answers = world.play(&requests, 10_000, false).unwrap();
    let low = answers[400].ended;
    let high = answers[..400].iter().map(|answer| answer.ended).max().unwrap();
    // It has to gain more than five levels, one a second of 100 steps, and then the place has to come free.
    assert!((500..=620).contains(&low) && high > 2_000, "low priority answered at {low}, flood over at {high}");
}

#[test]
fn a_large_request_is_not_passed_by_small_ones_for_ever() {
    // The large one needs most of the pool; small ones keep arriving and would always fit.
    let mut requests: Vec<Request> = (0..600).map(|at| request(0, 0, at / 3)).collect();
    requests.push(Request { prompt: (0..180).collect(), ..request(1, 0, 10) });
    let mut world = World::new(WorldSpec { blocks: 50, max_running: 16, ..roomy() });
    let answers = world.play(&requests, 10_000, false).unwrap();
    assert!(answers[600].ended < 150, "answered at {}", answers[600].ended);
}

/// How a request ends before its time.
#[derive(Clone, Copy, PartialEq, Debug)]
enum End {
    ClientGone,
    Deadline,
    DeviceLost,
}

/// A request ends after each number of steps, so in each phase of its life; whoever is in the same batch, or waits for
/// its prefix, must not notice unless the device is lost.
#[test]
fn every_way_to_end_in_every_phase_of_a_request_leaves_nothing_behind_and_disturbs_nobody() {
    let prompt = |from: u32, length: u32| -> Vec<u32> { (0..length).map(|at| (from + at) % 256).collect() };
    let long = Request { prompt: prompt(0, 60), max_tokens: 6, ..request(0, 0, 0) };
    let phases: [(&str, usize, Vec<Request>); 4] = [
        // Reads its prompt for five steps, then answers for six; the witness does both beside it.
        ("computed", 4, vec![long.clone(), Request { prompt: prompt(100, 50), ..request(1, 0, 0) }]),
        ("queued", 1, vec![long.clone(), request(1, 0, 0)]),
        ("followed", 4, vec![long.clone(), Request { account: 1, seed: 100, ..long.clone() }]),
        ("several choices", 4, vec![Request { choices: 3, ..long.clone() }, request(1, 0, 0)]),
    ];
    for (phase, max_running, requests) in &phases {
        for end in [End::ClientGone, End::Deadline, End::DeviceLost] {
            // Either of the two: the one that computes and the one that waits for it.
            for (leaver, after) in (0..2).flat_map(|leaver| (0..22).map(move |after| (leaver, after))) {
                let mut requests = requests.clone();
                let fail_at = if end == End::DeviceLost { after as u64 + 1 } else { 0 };
                match end {
                    End::ClientGone => requests[leaver].leaves = Some(after),
                    End::Deadline => requests[leaver].deadline = Some(STEP * after as u32),
                    End::DeviceLost => {}
                }
                let mut world = World::new(WorldSpec { max_running: *max_running, fail_at, ..roomy() });
                let story = format!("{phase}: {leaver} ended by {end:?} after {after} steps");
                let answers = world.play(&requests, 1_000, false).unwrap_or_else(|error| panic!("{story}: {error}"));
                world.is_empty().unwrap_or_else(|error| panic!("{story}: {error}"));
                let mut alone = HashMap::new();
                for (request, answer) in requests.iter().zip(&answers) {
                    judge(&world, request, answer, &mut alone).unwrap_or_else(|error| panic!("{story}: {error}"));
                }
                let other = &answers[1 - leaver];
                assert!(end == End::DeviceLost || other.done.is_some(), "{story}: the other one is not complete");
                if end == End::Deadline && answers[leaver].failed.is_some() {
                    assert_eq!(answers[leaver].ended, after, "{story}: not within a step");
                }
            }
        }
    }
}

#[test]
fn a_late_answer_is_cut_at_its_deadline_and_not_before() {
    let late = |millis| Request { max_tokens: 100, deadline: Some(Duration::from_millis(millis)), ..request(0, 0, 0) };
    let mut world = World::new(roomy());
    let answers = world.play(&[late(200), late(20_000)], 10_000, false).unwrap();
    assert_eq!((answers[0].failed, answers[0].text(0).len(), answers[0].ended), (Some(Kind::Timeout), 20, 20));
    assert_eq!((answers[1].failed, answers[1].text(0).len()), (None, 100));
}
