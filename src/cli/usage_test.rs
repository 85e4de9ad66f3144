use serde_json::json;

use super::*;

fn row(dimensions: &Value, count: u64) -> Value {
    json!({
        "count": count, "dimensions": dimensions,
        "sum": { "cost": 0.0042, "totalNeurons": 381.5, "erroredRequests": 2, "totalInputTokens": 1_234_567, "totalOutputTokens": 99_999 },
        "avg": { "latency": null },
        "quantiles": { "latencyP50": 8.25, "latencyP95": 812.0, "latencyP99": 12_340.0, "ttftP50": null },
        "ratio": { "cacheHits": 0.256 },
    })
}

fn report(step: Option<&str>, rows: &[Value]) -> Report {
    let report = json!({
        "from": "2026-05-01T00:00:00Z", "to": "2026-05-02T00:00:00Z", "step": step, "total": rows.len(), "truncated": false, "rows": rows,
    });
    let answer = json!({ "result": report, "success": true, "errors": [], "messages": [] });
    result(answer.to_string().as_bytes()).unwrap()
}

#[test]
fn a_table_has_a_trend_for_each_row_and_all_of_them_below() {
    let rows = [row(&json!({ "model": "gpt-4o" }), 123_456), row(&json!({ "model": "a" }), 3)];
    let at = |model: &str, hour: u8, count| {
        row(&json!({ "datetimeHour": format!("2026-05-01T{hour:02}:00:00Z"), "model": model }), count)
    };
    let trends = [at("gpt-4o", 3, 8), at("gpt-4o", 12, 4), at("gpt-4o", 23, 1), at("a", 0, 1), at("b", 22, 90)];
    let (trends, all) = (report(Some("hour"), &trends), report(None, &[row(&json!({}), 123_459)]));
    let shown = table(&report(None, &rows), &all, Some(&trends), &[By::Model], false);
    let numbers = "2   26%      1.23M       99999   381.50  <0.01  8.2 ms  812 ms  12.3 s     -";
    let expected = format!(
        "model   requests  errors  hits  tokens in  tokens out  neurons    USD     p50     p95     p99  ttft\n\
         gpt-4o      123k       {numbers}    @     =      .\n\
         a              3       {numbers}  @\n\
         all         123k       {numbers}  . :     .      @\n"
    );
    assert_eq!(shown, expected);
    let fancy = table(&report(None, &rows), &all, Some(&trends), &[By::Model], true);
    assert!(fancy.contains("  █     ▄      ▁\n"), "{fancy}");
}

#[test]
fn times_have_bars_as_long_as_their_share_of_the_longest() {
    let day = |day: u8, count| row(&json!({ "date": format!("2026-05-{day:02}"), "model": "a" }), count);
    let (days, all) = (report(Some("day"), &[day(1, 32), day(2, 9), day(3, 0)]), report(None, &[row(&json!({}), 41)]));
    let bars = |is_fancy| {
        let table = table(&days, &all, None, &[By::Day, By::Model], is_fancy);
        table.lines().map(|line| line.rsplit("  ").next().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(bars(false), ["ttft", &"#".repeat(16), "#####", "-", "-"].map(|text| text.trim().to_owned()));
    let hour = report(Some("hour"), &[row(&json!({ "datetimeHour": "2026-05-01T03:00:00Z" }), 7)]);
    assert!(table(&hour, &all, None, &[By::Hour], false).starts_with("hour  "));
    assert!(table(&hour, &all, None, &[By::Hour], false).contains("\n2026-05-01 03:00  "));
    assert_eq!(bars(true)[1..3], [&"█".repeat(16)[..], "████▌"]);
}

#[test]
fn csv_quotes_what_has_to_be_and_ends_lines_with_crlf() {
    let rows =
        [row(&json!({ "model": "a \"b\", c", "status": 200 }), 1), row(&json!({ "model": "", "status": 499 }), 2)];
    let text = csv(&report(None, &rows), &[By::Model, By::Status]);
    let numbers = "0.0042,381.5,2,1234567,99999,,8.25,812.0,12340.0,,0.256";
    let heading = "model,status,count,sum_cost,sum_totalNeurons,sum_erroredRequests,sum_totalInputTokens,sum_totalOutputTokens,\
                   avg_latency,quantiles_latencyP50,quantiles_latencyP95,quantiles_latencyP99,quantiles_ttftP50,ratio_cacheHits";
    assert_eq!(text, format!("{heading}\r\n\"a \"\"b\"\", c\",200,1,{numbers}\r\n,499,2,{numbers}\r\n"));
    assert_eq!(csv(&report(None, &[]), &[By::Day]), "date,count\r\n");
}

#[test]
fn numbers_are_short() {
    for (number, shown) in [
        (0.0, "0"),
        (99_999.0, "99999"),
        (0.5, "0.50"),
        (100_000.0, "100k"),
        (999_999.0, "1.00M"),
        (1_234_567.0, "1.23M"),
        (12_345_678.0, "12.3M"),
        (1e15, "1000T"),
        (1e18, "1000000T"),
    ] {
        assert_eq!(short(number), shown);
    }
    assert_eq!([0.0, 0.001, 0.01, 12.345].map(usd), ["0.00", "<0.01", "0.01", "12.35"]);
    assert_eq!(
        [0.04, 9.96, 999.6, 99_940.0, 1e6].map(milliseconds),
        ["0.0 ms", "10.0 ms", "1.0 s", "99.9 s", "1000 s"]
    );
}

#[derive(clap::Parser)]
struct Line {
    #[command(flatten)]
    args: Args,
}

fn parse(words: &str) -> Result<Args, clap::Error> {
    <Line as clap::Parser>::try_parse_from(words.split(' ')).map(|line| line.args)
}

#[test]
fn days_and_dates_become_what_the_daemon_reads() {
    let today = "2026-05-07".parse().unwrap();
    for (words, from, to) in [
        ("usage", "2026-05-01", None),
        ("usage --days 1", "2026-05-07", None),
        ("usage --from 24h", "24h", None),
        ("usage --from 2026-05-01 --to 2026-05-31", "2026-05-01", Some("2026-06-01")),
        ("usage --from 2026-05-01 --to 2026-05-31T12:00:00Z", "2026-05-01", Some("2026-05-31T12:00:00Z")),
    ] {
        assert_eq!(time(&parse(words).unwrap(), today).unwrap(), (from.to_owned(), to.map(str::to_owned)), "{words}");
    }
    assert!(time(&parse("usage --to 2026-05-31").unwrap(), today).is_err());
    assert_eq!(parse("usage --by model,day").unwrap().by, [By::Model, By::Day]);
    for wrong in
        ["usage --by week", "usage --days 0", "usage --days 3 --from 1h", "usage --json --csv x", "usage --limit 0"]
    {
        assert!(parse(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn what_the_daemon_refuses_is_explained() {
    let explained =
        |status, message: &str| explained(Failure { reason: Reason::Status(status), message: message.into() });
    assert_eq!(explained(400, "from is wrong").kind(), crate::base::Kind::BadInput);
    assert!(explained(403, "not yours").message().contains("--account"));
    assert!(result::<Report>(b"<html>").err().unwrap().message().contains("--url"));
}
