use super::*;
use crate::logs::analytics::tests::record;

fn block(table: &Table) -> Vec<u8> {
    table.encode()
}

/// Rows as text, sorted: names, status, cache, requests.
fn told(table: &Table) -> Vec<String> {
    let mut rows: Vec<String> = table
        .rows
        .iter()
        .map(|(key, row)| {
            let names = key.names.map(|name| table.names.text(name).to_owned()).join(" ");
            format!("{names} {} {} {}", key.status, key.cache_use().as_str(), row.counts.requests)
        })
        .collect();
    rows.sort();
    rows
}

fn read(bytes: &[u8]) -> Table {
    let mut table = Table::default();
    table.merge(&Block::read(bytes).unwrap(), usize::MAX).unwrap();
    table
}

/// So many calls to models of an account.
fn observed(calls: &[(&str, &str, u64)], most: usize) -> (Table, u64) {
    let (mut table, mut folded) = (Table::default(), 0);
    for (account, model, times) in calls {
        for _ in 0..*times {
            folded += u64::from(!table.observe(&record(0).account(account).model(model).0, most));
        }
    }
    (table, folded)
}

#[test]
fn a_block_is_read_back_as_it_was_and_two_are_added_up() {
    let mut table = Table::default();
    for second in 0..50 {
        let call = record(second).model(["a", "b", "other"][second as usize % 3]).status(200 + second as u16 % 2 * 229);
        table.observe(&call.0, 100);
    }
    let copy = read(&block(&table));
    assert_eq!(told(&copy), told(&table));
    assert_eq!(told(&table).len(), 6);
    let row = |table: &Table| {
        let own = |key: &&Key| table.names.text(key.names[3]) == "a" && key.status == 200;
        table.rows[table.rows.keys().find(own).unwrap()].clone()
    };
    assert_eq!(row(&copy), row(&table));
    let mut twice = read(&block(&table));
    twice.merge(&Block::read(&block(&table)).unwrap(), 100).unwrap();
    assert_eq!(twice.len(), 6);
    assert_eq!(row(&twice).counts.tokens_in, 2 * row(&table).counts.tokens_in);
    assert_eq!(row(&twice).latency.quantiles([0.5]), row(&table).latency.quantiles([0.5]));
}

#[test]
fn a_cut_or_damaged_block_is_none_or_other_rows_but_never_a_panic() {
    let (table, _) = observed(&[("acme", "a", 3), ("acme", "b", 1), ("zed", "a", 2)], 10);
    let bytes = block(&table);
    for cut in 0..bytes.len() {
        let is_whole = Block::read(&bytes[..cut]).is_some_and(|block| block.lines().all(|line| line.is_some()));
        let rows = Block::read(&bytes[..cut]).map_or(0, |block| block.lines().flatten().count());
        assert!(!is_whole || rows < 3, "cut at {cut}");
    }
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << bit;
            let _ = Block::read(&damaged).and_then(|block| Table::default().merge(&block, 100));
        }
    }
}

#[test]
fn what_is_too_much_goes_under_other_and_the_sums_of_an_account_stay() {
    let check = |most: usize, calls: &[(&str, &str, u64)], rows: &[&str], count: u64| {
        let (table, folded) = observed(calls, most);
        assert_eq!((told(&table), folded), (rows.iter().map(ToString::to_string).collect(), count));
    };
    let calls = [("acme", "a", 2), ("acme", "b", 4), ("acme", "c", 3), ("acme", "b", 1), ("x", "a", 1), ("y", "a", 1)];
    let own = ["acme default openai a ci 200 miss 2", "acme default openai b ci 200 miss 5"];
    let others = ["acme other other other other 200 miss 3", "other other other other other 200 miss 2"];
    // One row more than four is for the first account that is folded; the next ones are `other` themselves.
    check(2, &calls, &[own[0], own[1], "other other other other other 200 miss 5"], 5);
    let four = [("acme", "d", 1), ("acme", "e", 1)];
    let rows = [own[0], own[1], "acme default openai d ci 200 miss 1", "acme default openai e ci 200 miss 1"];
    check(4, &[&calls[..2], &four, &calls[2..]].concat(), &[&rows[..], &others].concat(), 5);
    check(6, &[("other", "a", 1)], &["other default openai a ci 200 miss 1"], 0);
}

#[test]
fn shrinking_keeps_the_busiest_and_the_sum() {
    let calls: Vec<(String, String)> = (0..40).map(|n| (format!("a{}", n % 20), format!("m{n}"))).collect();
    let calls: Vec<_> =
        calls.iter().zip(1..).map(|((account, model), times)| (&account[..], &model[..], times)).collect();
    let (mut table, _) = observed(&calls, 100);
    table.shrink(40);
    assert_eq!(table.len(), 40);
    table.shrink(8);
    // Eight of their own, two for accounts, one for what is left.
    let rows = told(&table);
    assert_eq!(rows.len(), 11, "{rows:?}");
    for model in 32..40 {
        assert!(rows.iter().any(|row| row.contains(&format!(" m{model} "))), "{model}: {rows:?}");
    }
    let requests = |table: &Table| table.rows.values().map(|row| row.counts.requests).sum::<u64>();
    assert_eq!(requests(&table), 820);
    table.shrink(8);
    assert_eq!((told(&table), requests(&read(&block(&table)))), (rows, 820));
    assert_eq!(
        Block::read(&block(&table)).unwrap().names().len(),
        8 + 8 + 2 + 3,
        "names of folded rows are not written"
    );
}

#[test]
fn long_names_are_cut_between_characters() {
    let (mut table, long) = (Table::default(), "ü".repeat(100));
    table.observe(&record(0).model(&format!("x{long}")).0, 10);
    assert!(told(&table)[0].contains(&format!(" x{} ", &long[..126])), "{}", told(&table)[0]);
}
