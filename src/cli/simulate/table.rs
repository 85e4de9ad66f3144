//! A simulated day for people: one column a run, latencies, accounts, and the day in parts.

use crate::cli::table::{Side, render};
use crate::simulate::report::{Report, Times};

use Side::{Left, Right};

/// Everything worth reading, of one run or of two beside each other.
pub fn report(reports: &[(String, Report)]) -> String {
    let Some((_, first)) = reports.first() else { return String::new() };
    let mut text = format!("{}\n\n{}", first.title, figures(reports));
    text += "\n";
    text += &latencies(reports);
    for (name, report) in reports {
        let of = if reports.len() > 1 { format!(" ({name})") } else { String::new() };
        text += &format!("\naccounts{of}\n{}", accounts(report));
    }
    for (name, report) in reports {
        let of = if reports.len() > 1 { format!(" ({name})") } else { String::new() };
        text += &format!("\nthe time in parts{of}\n{}", parts(report));
    }
    text
}

fn figures(reports: &[(String, Report)]) -> String {
    let percent = |part: u64, whole: u64| format!("{:.2} %", part as f64 / whole.max(1) as f64 * 100.0);
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut row = |name: &str, value: &dyn Fn(&Report) -> String| {
        let mut cells = vec![name.to_owned()];
        cells.extend(reports.iter().map(|(_, report)| value(report)));
        rows.push(cells);
    };
    row("requests", &|report| grouped(report.tally.requests));
    row("answered to the end", &|report| percent(report.tally.done, report.tally.requests));
    let mut lacks: Vec<_> = reports.iter().flat_map(|(_, report)| report.tally.lacking.keys().copied()).collect();
    lacks.sort();
    lacks.dedup();
    for lack in lacks {
        let name = format!("  {}", lack.as_str().replace('_', " "));
        row(&name, &|report| grouped(report.tally.lacking.get(&lack).copied().unwrap_or(0)));
    }
    if reports.iter().any(|(_, report)| report.tally.deaths + report.tally.slow_spells > 0) {
        row("devices died, were slow", &|report| format!("{}, {}", report.tally.deaths, report.tally.slow_spells));
        row("handed to another device", &|report| grouped(report.tally.retried));
    }
    row("requests/s", &|report| format!("{:.2}", report.per_s(report.tally.done)));
    row("output tokens/s", &|report| format!("{:.0}", report.per_s(report.tally.produced())));
    row("prompt tokens/s", &|report| format!("{:.0}", report.per_s(report.tally.prompt_tokens)));
    row("found in the prefix cache", &|report| format!("{:.1} %", report.hit_rate() * 100.0));
    row("devices busy", &|report| format!("{:.1} %", report.mean_utilisation() * 100.0));
    row("  least and most", &|report| {
        let least = report.utilisation.iter().copied().fold(f64::INFINITY, f64::min) * 100.0;
        let most = report.utilisation.iter().copied().fold(0.0, f64::max) * 100.0;
        format!("{least:.1} to {most:.1} %")
    });
    row("rows a step", &|report| format!("{:.1}", report.rows_per_step()));
    row("KV tokens a device", &|report| {
        let block_tokens = report.settings.iter().find(|(name, _)| *name == "block_tokens");
        grouped(report.blocks as u64 * block_tokens.and_then(|(_, tokens)| tokens.as_u64()).unwrap_or(1))
    });
    row("preemptions for want of KV", &|report| grouped(report.tally.preemptions));
    row("made way for other accounts", &|report| grouped(report.tally.made_way));
    row("waited for a prefix under way", &|report| grouped(report.tally.followed));
    row("rows computed again", &|report| percent(report.tally.recomputed_rows, report.tally.rows));
    row("fairness between accounts", &|report| format!("{:.3}", report.fairness()));
    row("neurons", &|report| {
        let neurons: u64 = report.tally.accounts.iter().map(|account| account.neurons.micro()).sum();
        grouped(neurons / 1_000_000)
    });
    let mut columns = vec![("", Left)];
    columns.extend(reports.iter().map(|(name, _)| (if reports.len() > 1 { name.as_str() } else { "" }, Right)));
    let table = render(&columns, &rows);
    // A single run's column has no name worth a line.
    if reports.len() > 1 { table } else { table.trim_start_matches(['\n', ' ']).to_owned() }
}

fn latencies(reports: &[(String, Report)]) -> String {
    let mut rows = Vec::new();
    for what in 0..4 {
        for (name, report) in reports {
            let tally = &report.tally;
            let (label, times): (&str, &Times) = [
                ("queued", &tally.queued),
                ("first token", &tally.ttft),
                ("between tokens", &tally.itl),
                ("end to end", &tally.total),
            ][what];
            if times.count() == 0 {
                continue;
            }
            let mut row = vec![label.to_owned()];
            if reports.len() > 1 {
                row.push(name.clone());
            }
            row.push(ms(times.mean_ms()));
            row.extend([0.5, 0.9, 0.99, 1.0].map(|quantile| ms(times.ms(quantile))));
            rows.push(row);
        }
    }
    let mut columns = vec![("milliseconds", Left)];
    columns.extend((reports.len() > 1).then_some(("", Left)));
    columns.extend([("mean", Right), ("p50", Right), ("p90", Right), ("p99", Right), ("max", Right)]);
    render(&columns, &rows)
}

fn accounts(report: &Report) -> String {
    let produced = report.tally.produced().max(1) as f64;
    let rows: Vec<_> = report
        .tally
        .accounts
        .iter()
        .filter(|account| account.requests > 0)
        .map(|account| {
            vec![
                account.name.clone(),
                grouped(account.requests),
                format!("{:.2} %", account.done as f64 / account.requests as f64 * 100.0),
                format!("{:.1} %", account.produced as f64 / produced * 100.0),
                ms(account.ttft.ms(0.5)),
                ms(account.ttft.ms(0.99)),
                format!("{:.2}", account.pace()),
                grouped(account.neurons.micro() / 1_000_000),
            ]
        })
        .collect();
    let columns = [
        ("", Left),
        ("requests", Right),
        ("answered", Right),
        ("of all tokens", Right),
        ("TTFT p50", Right),
        ("p99", Right),
        ("pace", Right),
        ("neurons", Right),
    ];
    render(&columns, &rows)
}

fn parts(report: &Report) -> String {
    let seconds = report.part_s();
    let rows: Vec<_> = (0..)
        .zip(&report.tally.parts)
        .map(|(at, part)| {
            let busy = part.busy_ns as f64 / 1e9 / seconds / report.utilisation.len().max(1) as f64;
            vec![
                clock(f64::from(at) * seconds, seconds),
                grouped(part.requests),
                grouped((part.tokens as f64 / seconds) as u64),
                format!("{:.1} %", busy * 100.0),
                grouped(part.open),
                ms(part.ttft.ms(0.5)),
                ms(part.ttft.ms(0.99)),
            ]
        })
        .collect();
    let columns = [
        ("from", Left),
        ("requests", Right),
        ("output tok/s", Right),
        ("busy", Right),
        ("open at most", Right),
        ("TTFT p50", Right),
        ("p99", Right),
    ];
    render(&columns, &rows)
}

/// Time of day, to the second where parts are no whole minutes.
fn clock(seconds: f64, part_s: f64) -> String {
    let whole = seconds as u64;
    let (hours, minutes) = (whole / 3_600, whole / 60 % 60);
    if part_s < 2.0 {
        format!("{seconds:.2} s")
    } else if part_s % 60.0 == 0.0 {
        format!("{hours:02}:{minutes:02}")
    } else {
        format!("{hours:02}:{minutes:02}:{:02}", whole % 60)
    }
}

fn ms(value: f64) -> String {
    if value >= 1_000.0 { grouped(value.round() as u64) } else { format!("{value:.1}") }
}

/// `1,234,567`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_times_are_readable() {
        for (number, shown) in [(0, "0"), (999, "999"), (1_000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(number), shown);
        }
        for (seconds, part_s, shown) in
            [(0.0, 3_600.0, "00:00"), (82_800.0, 3_600.0, "23:00"), (75.0, 75.0, "00:01:15"), (2.5, 1.25, "2.50 s")]
        {
            assert_eq!(clock(seconds, part_s), shown);
        }
        assert_eq!((ms(12.34), ms(1_234.6)), ("12.3".into(), "1,235".into()));
    }
}
