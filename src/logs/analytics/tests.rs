use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use super::*;
use crate::base::{KeyId, Neurons, RequestId};
use crate::logs::record::{Body, CacheUse};
use crate::task::Usage;

/// 2026-05-01T00:00:00Z in seconds.
const MAY: u64 = 1_777_593_600;

/// A call, to be changed in what matters.
pub(super) struct Call(pub(super) Record);

/// A call of half a second, so many seconds into May.
pub(super) fn record(second: u64) -> Call {
    Call(Record {
        id: None,
        request: RequestId::from_number(second.into()),
        at: Millis((MAY + second) * 1000),
        account: AccountId::new("acme"),
        key: Some(KeyId::new("ci")),
        gateway: "default".into(),
        provider: "openai".into(),
        model: "gpt-4o".into(),
        task: None,
        path: "chat/completions".into(),
        status: 200,
        success: true,
        cache: CacheUse::Miss,
        duration_us: 500_000,
        first_byte_us: Some(100_000),
        usage: Some(Usage { prompt_tokens: 100, completion_tokens: 20, cached_tokens: 40, ..Usage::default() }),
        cost: Neurons::from_micro(1_000_000),
        custom_cost: false,
        saved: Neurons::ZERO,
        step: 0,
        request_type: "http".into(),
        request_content_type: None,
        response_content_type: None,
        metadata: None,
        trace: None,
        zero_retention: false,
        event: None,
        user_agent: None,
        authenticated: true,
        stored_key: false,
        attempts: "".into(),
        why: None,
        findings: vec![],
        asked: Body { kept: Default::default(), size: 1000 },
        answered: Body { kept: Default::default(), size: 300 },
    })
}

impl Call {
    pub(super) fn account(mut self, account: &str) -> Self {
        self.0.account = AccountId::new(account);
        self
    }

    pub(super) fn model(mut self, model: &str) -> Self {
        self.0.model = model.into();
        self
    }

    pub(super) fn status(mut self, status: u16) -> Self {
        (self.0.status, self.0.success) = (status, status < 400);
        self
    }

    fn took(mut self, milliseconds: u64) -> Self {
        (self.0.duration_us, self.0.first_byte_us) = (milliseconds * 1000, Some(milliseconds * 100));
        self
    }

    fn hit(mut self) -> Self {
        (self.0.cache, self.0.saved) = (CacheUse::Hit, std::mem::take(&mut self.0.cost));
        self
    }
}

fn at(second: u64) -> Millis {
    Millis((MAY + second) * 1000)
}

fn open(folder: Option<&Path>, second: u64) -> Analytics {
    let settings = Settings { folder: folder.map(Path::to_owned), flush_every: Duration::ZERO, ..Settings::default() };
    Analytics::open(settings, at(second)).unwrap()
}

fn ask(analytics: &Analytics, query: &str, second: u64) -> Value {
    analytics.query(Some(&AccountId::new("acme")), query, at(second)).unwrap_or_else(|error| panic!("{query}: {error}"))
}

/// Rows as text: dimensions and count.
fn rows(analytics: &Analytics, query: &str, second: u64) -> Vec<String> {
    let answer = ask(analytics, query, second);
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let row = |row: &Value| {
        let dimensions = row["dimensions"].as_object().unwrap().values().map(text);
        dimensions.chain([text(&row["count"])]).collect::<Vec<_>>().join(" ")
    };
    answer["rows"].as_array().unwrap().iter().map(row).collect()
}

fn count(analytics: &Analytics, query: &str, second: u64) -> u64 {
    ask(analytics, query, second)["rows"].as_array().unwrap().iter().map(|row| row["count"].as_u64().unwrap()).sum()
}

/// One call each five minutes over these seconds, told as it happens.
fn run(analytics: &Analytics, seconds: std::ops::Range<u64>) {
    for second in seconds.step_by(300) {
        analytics.tick(at(second));
        analytics.observe(&record(second).0);
    }
}

const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;

#[test]
fn every_measure_is_told_under_its_name() {
    let analytics = open(None, 0);
    for (index, call) in [
        record(1).took(100),
        record(2).took(200),
        record(3).took(300).status(429),
        record(4).took(400).status(502),
        record(5).took(10).hit(),
        record(6).took(10).hit().model("m"),
    ]
    .into_iter()
    .enumerate()
    {
        let mut call = call.0;
        if index == 2 || index == 1 {
            call.usage = None;
        }
        analytics.observe(&call);
    }
    let answer = ask(&analytics, "group_by=model", 10);
    assert_eq!((&answer["total"], &answer["truncated"], &answer["step"]), (&2.into(), &false.into(), &Value::Null));
    let row = &answer["rows"][0];
    assert_eq!((&row["count"], &row["dimensions"]), (&5.into(), &serde_json::json!({ "model": "gpt-4o" })));
    for (section, name, value) in [
        ("sum", "cost", 0.000044),
        ("sum", "savedCost", 0.000011),
        ("sum", "totalNeurons", 4.0),
        ("sum", "savedNeurons", 1.0),
        ("sum", "cachedRequests", 1.0),
        ("sum", "erroredRequests", 2.0),
        ("sum", "requests4xx", 1.0),
        ("sum", "requests5xx", 1.0),
        ("sum", "unmeteredRequests", 1.0),
        ("sum", "totalInputTokens", 300.0),
        ("sum", "totalOutputTokens", 60.0),
        ("sum", "cachedTokensIn", 100.0),
        ("sum", "cachedTokensOut", 20.0),
        ("sum", "uncachedTokensIn", 200.0),
        ("sum", "uncachedTokensOut", 40.0),
        ("sum", "promptCachedTokens", 120.0),
        ("sum", "bytesIn", 5000.0),
        ("sum", "bytesOut", 1500.0),
        ("avg", "latency", 202.0),
        ("avg", "ttft", 20.2),
        ("avg", "tokensPerRequest", 72.0),
        ("ratio", "cacheHits", 0.2),
        ("ratio", "errored", 0.4),
        ("ratio", "requests4xx", 0.2),
        ("ratio", "requests5xx", 0.2),
    ] {
        let told = row[section][name].as_f64().unwrap_or_else(|| panic!("{section}.{name} is not told"));
        assert!((told - value).abs() < 1e-9, "{section}.{name} is {told}, not {value}");
    }
    for (name, value) in [("latencyP50", 200.0), ("latencyP95", 300.0), ("latencyP99", 300.0), ("ttftP50", 20.0)] {
        let told = row["quantiles"][name].as_f64().unwrap();
        assert!((told / value - 1.0).abs() <= RELATIVE_ERROR, "{name} is {told}, not {value}");
    }
    let nothing = ask(&analytics, "model=none", 10);
    assert_eq!(nothing["rows"], serde_json::json!([]));
}

#[test]
fn dollars_are_told_as_they_were_said() {
    let analytics = open(None, 0);
    for call in [record(1), record(2).hit()] {
        let mut call = call.0;
        let amount = if call.cache.is_hit() { &mut call.saved } else { &mut call.cost };
        *amount = Neurons::from_usd(0.25);
        analytics.observe(&call);
    }
    let sum = &ask(&analytics, "", 10)["rows"][0]["sum"];
    assert_eq!((&sum["cost"], &sum["savedCost"]), (&0.25.into(), &0.25.into()));
}

#[test]
fn calls_are_grouped_filtered_ordered_and_limited() {
    let analytics = open(None, 0);
    for (model, status, times) in [("a", 200, 3), ("a", 404, 1), ("b", 200, 5), ("b", 503, 1), ("c", 200, 1)] {
        (0..times)
            .for_each(|second| analytics.observe(&record(second).model(model).status(status).took(1000 / times).0));
    }
    analytics.observe(&record(9).account("zed").model("d").0);
    let check = |query: &str, expected: &[&str]| assert_eq!(rows(&analytics, query, 10), expected, "{query}");
    check("", &["11"]);
    check("group_by=model", &["b 6", "a 4", "c 1"]);
    check("group_by=model&limit=1", &["b 6"]);
    check("group_by=model&direction=asc", &["c 1", "a 4", "b 6"]);
    check("group_by=model&order_by=latencyP50", &["c 1", "a 4", "b 6"]);
    check("group_by=model&order_by=requests4xx", &["a 4", "b 6", "c 1"]);
    check("group_by=model,status&model=a,b", &["b 200 5", "a 200 3", "a 404 1", "b 503 1"]);
    check("group_by=statusClass", &["2xx 9", "4xx 1", "5xx 1"]);
    check("group_by=status&status=4xx,503", &["404 1", "503 1"]);
    check("group_by=gateway,provider,key,cache", &["default openai ci miss 11"]);
    check("model=a&status=200", &["3"]);
    check("key=other", &[]);
    check("step=hour&group_by=model&model=c", &["2026-05-01T00:00:00Z c 1"]);
    assert_eq!(ask(&analytics, "group_by=model&limit=2", 10)["truncated"], true);
    let all = analytics.query(None, "group_by=account", at(10)).unwrap();
    assert_eq!(all["rows"][1]["dimensions"]["account"], "zed");
}

#[test]
fn minutes_become_hours_and_days_and_every_step_tells_the_same_sum() {
    let folder = tempfile::tempdir().unwrap();
    for folder in [None, Some(folder.path())] {
        let analytics = open(folder, 0);
        run(&analytics, 0..2 * DAY + 2 * HOUR);
        let end = 2 * DAY + 2 * HOUR;
        analytics.flush(at(end));
        assert_eq!(
            rows(&analytics, "from=2026-05-01&step=day", end),
            ["2026-05-01 288", "2026-05-02 288", "2026-05-03 24"]
        );
        let hours = rows(&analytics, "from=2026-05-01&step=hour", end);
        assert_eq!((hours.len(), &hours[24][..]), (50, "2026-05-02T00:00:00Z 12"));
        assert_eq!(rows(&analytics, "from=2026-05-02T23:55:00Z&to=2026-05-03T00:01:00Z&step=minute", end).len(), 2);
        assert_eq!(count(&analytics, "from=2d&step=minute&limit=9999", end), 2 * 288);
        assert_eq!(count(&analytics, "from=2026-05-01", end), 600);
        assert_eq!(count(&analytics, "from=2026-05-02T11:30:00Z&to=2026-05-03T00:30:00Z", end), 156);
        let kept = analytics.state.lock();
        let closed =
            |tier| kept.shelf.cover(&(0..u32::MAX / 2), tier, &[]).iter().filter(|(of, _)| *of == tier).count();
        assert_eq!((closed(Tier::Hour), closed(Tier::Day)), (49, 2), "in {folder:?}");
        assert_eq!((kept.stats, kept.shelf.held_bytes() > 0), (Stats::default(), folder.is_none()));
    }
}

#[test]
fn calls_told_late_count_when_they_began_and_those_told_too_late_in_the_oldest_open_minute() {
    let folder = tempfile::tempdir().unwrap();
    let analytics = open(Some(folder.path()), 0);
    run(&analytics, 0..HOUR);
    let now = HOUR;
    analytics.tick(at(now));
    // Across the hour, in any order.
    for late in [9 * 60, 1, 5 * 60, 30] {
        analytics.observe(&record(now - late).model("late").0);
    }
    analytics.observe(&record(10).model("later").0);
    // From a clock that is ahead.
    analytics.observe(&record(now + 5 * HOUR).model("early").0);
    analytics.flush(at(now + 20 * 60));
    let models = "step=minute&group_by=model&model=late,later,early&from=2026-05-01&order_by=time";
    let expected = [
        "2026-05-01T00:50:00Z later 1",
        "2026-05-01T00:51:00Z late 1",
        "2026-05-01T00:55:00Z late 1",
        "2026-05-01T00:59:00Z late 2",
        "2026-05-01T01:01:00Z early 1",
    ];
    assert_eq!(rows(&analytics, models, now + 20 * 60), expected);
    assert_eq!(analytics.stats().moved, 2);
    drop(analytics);
    let analytics = open(Some(folder.path()), now + 20 * 60);
    assert_eq!(rows(&analytics, models, now + 20 * 60), expected);
}

#[test]
fn a_clock_that_goes_back_costs_no_call_and_counts_none_twice() {
    let analytics = open(None, 0);
    run(&analytics, 0..3 * HOUR);
    run(&analytics, HOUR..3 * HOUR);
    assert_eq!(count(&analytics, "from=2026-05-01", 3 * HOUR), 60);
    run(&analytics, 3 * HOUR..2 * DAY);
    let total = 60 + (2 * DAY - 3 * HOUR) / 300;
    for step in ["minute", "hour", "day", "none"] {
        assert_eq!(count(&analytics, &format!("from=2026-05-01&step={step}&limit=9999"), 2 * DAY), total, "{step}");
    }
    assert_eq!(analytics.stats().moved, 21, "of 24: three fell into minutes that were open still");
}

#[test]
fn a_restart_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let mut second = 0;
    for hours in [1, 3, 20, 2, 30] {
        let analytics = open(Some(folder.path()), second);
        assert_eq!(count(&analytics, "from=2026-05-01", second), second / 300);
        run(&analytics, second..second + hours * HOUR);
        second += hours * HOUR;
        analytics.flush(at(second));
        // Another daemon is kept out.
        assert!(
            Analytics::open(analytics.settings.clone(), at(second)).unwrap_err().message().contains("another daemon")
        );
    }
    // What was open when it stopped is closed by the time it is back.
    let analytics = open(Some(folder.path()), 10 * DAY);
    analytics.flush(at(10 * DAY));
    assert_eq!(
        rows(&analytics, "from=2026-05-01&step=day", 10 * DAY),
        ["2026-05-01 288", "2026-05-02 288", "2026-05-03 96"]
    );
    let names =
        || std::fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
    assert!(
        !names().any(|name| name.starts_with("parts-") || name.starts_with("minute-")),
        "{:?}",
        names().collect::<Vec<_>>()
    );
    // And in the end all is gone but the last day of all.
    analytics.flush(at(100 * DAY));
    assert!(!names().any(|name| name.starts_with("hour-")), "{:?}", names().collect::<Vec<_>>());
    analytics.flush(at(900 * DAY));
    assert_eq!(analytics.state.lock().shelf.first(Tier::Day), None);
}

#[test]
fn a_file_torn_anywhere_costs_what_was_in_its_end_and_nothing_else() {
    let whole = tempfile::tempdir().unwrap();
    let analytics = open(Some(whole.path()), 0);
    run(&analytics, 0..26 * HOUR);
    analytics.flush(at(26 * HOUR));
    drop(analytics);
    let (end, later) = (26 * HOUR, 26 * HOUR + 20 * 60);
    for file in std::fs::read_dir(whole.path()).unwrap().map(|file| file.unwrap().file_name()) {
        let bytes = std::fs::read(whole.path().join(&file)).unwrap();
        for cut in [1, 9, bytes.len()].map(|cut| bytes.len().saturating_sub(cut)) {
            let torn = tempfile::tempdir().unwrap();
            for file in std::fs::read_dir(whole.path()).unwrap().map(Result::unwrap) {
                std::fs::copy(file.path(), torn.path().join(file.file_name())).unwrap();
            }
            std::fs::write(torn.path().join(&file), &bytes[..cut]).unwrap();
            let analytics = open(Some(torn.path()), end);
            let before = count(&analytics, "from=2026-05-01", end);
            run(&analytics, end..later);
            let after = count(&analytics, "from=2026-05-01", later);
            analytics.flush(at(later));
            assert_eq!(after, before + 4, "{file:?} cut at {cut}");
            drop(analytics);
            let analytics = open(Some(torn.path()), later);
            analytics.flush(at(later));
            // A day or an hour that was lost is made anew of what it was made of before; minutes have only their parts, which are gone.
            let lost = 26 * 12 - before;
            let kind = file.to_str().unwrap().split('-').next().unwrap().to_owned();
            match &kind[..] {
                "day" | "hour" | ".lock" => {
                    assert_eq!((count(&analytics, "from=2026-05-01", later), lost), (26 * 12 + 4, 0), "{file:?}")
                }
                "parts" => assert!(lost <= 1, "{lost} lost of {file:?} cut at {cut}"),
                // Four hours of minutes; those in an hour or a day are there all the same.
                _ => assert!(lost <= 24, "{lost} lost of {file:?} cut at {cut}"),
            }
            assert_eq!(analytics.stats().damaged, 0);
        }
    }
}

#[test]
fn parts_that_a_kill_left_beside_their_block_are_not_counted_again() {
    let folder = tempfile::tempdir().unwrap();
    let analytics = open(Some(folder.path()), 0);
    run(&analytics, 0..300);
    analytics.flush(at(1));
    let parts = folder.path().join(format!("parts-{}", minute_of(at(0))));
    let bytes = std::fs::read(&parts).unwrap();
    drop(analytics);
    // With the minute's block there, and with only that of its day.
    for later in [20 * 60, 5 * DAY] {
        open(Some(folder.path()), later).flush(at(later));
        assert!(!parts.exists());
        std::fs::write(&parts, &bytes).unwrap();
        let analytics = open(Some(folder.path()), later);
        analytics.flush(at(later));
        assert_eq!((count(&analytics, "from=2026-05-01", later), parts.exists()), (1, false));
    }
}

#[test]
fn a_damaged_block_is_left_out_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let analytics = open(Some(folder.path()), 0);
    run(&analytics, 0..HOUR);
    let path = std::fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap().path());
    let path = path.into_iter().find(|path| path.to_str().unwrap().contains("minute-")).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[30] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(count(&analytics, "from=2026-05-01", HOUR), 11);
    assert_eq!(analytics.stats().damaged, 1);
}

#[test]
fn without_a_disk_memory_is_bounded_and_the_oldest_minutes_go_first() {
    let settings = Settings { memory_bytes: 80_000, flush_every: Duration::ZERO, ..Settings::default() };
    let analytics = Analytics::open(settings, at(0)).unwrap();
    for second in (0..6 * HOUR).step_by(60) {
        analytics.tick(at(second));
        assert!(analytics.state.lock().shelf.held_bytes() <= 80_000);
        (0..20).for_each(|n| analytics.observe(&record(second).model(&format!("m{n}")).0));
    }
    assert_eq!(
        count(&analytics, "from=2026-05-01&to=2026-05-01T05:00:00Z", 6 * HOUR),
        300 * 20,
        "the hours are all there"
    );
    assert!(count(&analytics, "step=minute", 6 * HOUR) < 360 * 20);
    let settings = Settings { series: 2, ..Settings::default() };
    let analytics = Analytics::open(settings, at(0)).unwrap();
    (0..20).for_each(|n| analytics.observe(&record(n * 70).model(&format!("m{n}")).0));
    assert_eq!(analytics.stats().folded, 18);
    assert_eq!(analytics.state.lock().fresh.iter().map(|(_, table)| table.len()).sum::<usize>(), 3);
}

#[test]
fn what_the_disk_does_not_take_stays_in_memory_until_it_does() {
    let folder = tempfile::tempdir().unwrap();
    let analytics = open(Some(folder.path()), 0);
    let minute = minute_of(at(0));
    let in_the_way = [5, 10].map(|n| format!("parts-{}", minute + n)).into_iter();
    let in_the_way: Vec<_> =
        in_the_way.chain([format!("minute-{}.blocks", minute / 240)]).map(|name| folder.path().join(name)).collect();
    in_the_way.iter().for_each(|path| std::fs::create_dir(path).unwrap());
    run(&analytics, 0..2 * HOUR);
    analytics.flush(at(2 * HOUR));
    assert_eq!(count(&analytics, "from=2026-05-01", 2 * HOUR), 24);
    assert!(analytics.state.lock().is_failing && analytics.state.lock().shelf.held_bytes() > 0);
    in_the_way.iter().for_each(|path| std::fs::remove_dir(path).unwrap());
    analytics.flush(at(2 * HOUR));
    assert!(!analytics.state.lock().is_failing && analytics.state.lock().shelf.held_bytes() == 0);
    assert_eq!(count(&analytics, "from=2026-05-01", 2 * HOUR), 24);
    drop(analytics);
    let analytics = open(Some(folder.path()), 2 * HOUR);
    assert_eq!((count(&analytics, "from=2026-05-01", 2 * HOUR), analytics.stats()), (24, Stats::default()));
}

#[test]
fn too_many_rows_are_refused_with_a_remedy() {
    let settings = Settings { series: 50_000, ..Settings::default() };
    let analytics = Analytics::open(settings, at(0)).unwrap();
    (0..20_001).for_each(|n| analytics.observe(&record(0).model(&format!("m{n}")).0));
    let refused = analytics.query(None, "group_by=model", at(10)).unwrap_err();
    assert!(refused.message().contains("longer step") && refused.param() == Some("group_by"), "{refused}");
    assert_eq!(count(&analytics, "", 10), 20_001);
}

#[test]
fn queries_while_all_is_moved_about_miss_no_call() {
    let folder = tempfile::tempdir().unwrap();
    let analytics = open(Some(folder.path()), 0);
    let counted = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut asked = 0;
            while counted.load(std::sync::atomic::Ordering::SeqCst) < 1080 {
                let before = counted.load(std::sync::atomic::Ordering::SeqCst);
                let told = count(&analytics, "from=2026-05-01", 3 * HOUR);
                let after = counted.load(std::sync::atomic::Ordering::SeqCst) + 1;
                assert!((before..=after).contains(&told), "{told} of {before} to {after}");
                asked += 1;
            }
            asked
        });
        for second in (0..3 * HOUR).step_by(10) {
            analytics.tick(at(second));
            analytics.observe(&record(second).0);
            counted.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        }
        assert!(asking.join().unwrap() > 1);
    });
    assert_eq!(analytics.stats().damaged, 0);
}

/// The test runs itself as the daemon that is killed.
#[test]
fn a_daemon_that_is_killed_loses_what_it_had_not_flushed_and_counts_nothing_twice() {
    const FOLDER: &str = "NEUROND_TEST_ANALYTICS";
    const TEST: &str = "a_daemon_that_is_killed_loses_what_it_had_not_flushed_and_counts_nothing_twice";
    if let Some(folder) = std::env::var_os(FOLDER) {
        let (folder, round) =
            (PathBuf::from(&folder), std::env::var("NEUROND_TEST_ROUND").unwrap().parse::<u64>().unwrap());
        let analytics = open(Some(&folder), round * 2 * DAY);
        let mut counted = 0;
        for second in (round * 2 * DAY..(round + 1) * 2 * DAY).step_by(90) {
            for late in 0..7 {
                analytics.observe(&record(second.saturating_sub(late * 75)).0);
            }
            counted += 7;
            println!("counted {counted}");
            analytics.flush(at(second));
            println!("flushed {counted}");
        }
        std::process::exit(0);
    }
    let folder = tempfile::tempdir().unwrap();
    let module = module_path!().split_once("::").unwrap().1;
    let mut total = 0;
    for round in 0..4u64 {
        let mut daemon = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("{module}::{TEST}"), "--nocapture"])
            .env(FOLDER, folder.path())
            .env("NEUROND_TEST_ROUND", round.to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (mut counted, mut flushed, mut lines) = (0, 0, 0);
        for line in BufReader::new(daemon.stdout.take().unwrap()).lines().map_while(Result::ok) {
            match line.split_once(' ').map(|(word, number)| (word, number.parse::<u64>())) {
                Some(("counted", Ok(number))) => counted = number,
                Some(("flushed", Ok(number))) => flushed = number,
                _ => continue,
            }
            lines += 1;
            if lines == 61 + round * 211 {
                daemon.kill().unwrap();
            }
        }
        daemon.wait().unwrap();
        assert!(lines > 60 + round * 211, "the daemon of round {round} came as far as {lines} lines");
        let now = (round + 1) * 2 * DAY;
        let analytics = open(Some(folder.path()), now);
        let told = count(&analytics, "from=2026-04-30", now);
        assert!((total + flushed..=total + counted).contains(&told), "{told} of {flushed} to {counted} after {total}");
        analytics.flush(at(now));
        assert_eq!(count(&analytics, "from=2026-04-30", now), told);
        assert_eq!(count(&analytics, "from=2026-04-30&step=hour", now), told, "in hours");
        total = told;
    }
}
