use super::*;

fn held(bytes: usize) -> Place {
    Place::Held(vec![0; bytes].into())
}

/// A shelf where every second minute from the 100th hour on has a part.
fn shelf(minutes: Range<u32>) -> Shelf {
    let mut shelf = Shelf::default();
    minutes.filter(|minute| minute % 2 == 0).for_each(|minute| shelf.add_part(minute, held(10)));
    shelf
}

/// Closes all that is due, as `flush` does; what was closed, in order.
fn close(shelf: &mut Shelf, before: u32) -> Vec<(Tier, u32)> {
    let mut closed: Vec<(Tier, u32)> = shelf.seal(before).into_iter().map(|minute| (Tier::Minute, minute)).collect();
    closed.iter().for_each(|(_, minute)| shelf.close(Tier::Minute, *minute, held(5)));
    for tier in [Tier::Hour, Tier::Day] {
        for start in shelf.to_close(tier, before) {
            shelf.close(tier, start, held(7));
            closed.push((tier, start));
        }
    }
    closed
}

const DAY: u32 = 1440;

#[test]
fn minutes_become_an_hour_once_all_are_closed_and_hours_a_day() {
    let mut shelf = shelf(DAY..DAY + 120);
    let count = |closed: &[(Tier, u32)]| Tier::ALL.map(|tier| closed.iter().filter(|(of, _)| *of == tier).count());
    assert_eq!(count(&close(&mut shelf, DAY + 59)), [30, 0, 0]);
    assert_eq!(count(&close(&mut shelf, DAY + 60)), [0, 1, 0]);
    assert_eq!(count(&close(&mut shelf, DAY + 61)), [1, 0, 0]);
    assert_eq!(shelf.inputs(Tier::Hour, 25).len(), 30);
    assert_eq!(count(&close(&mut shelf, 2 * DAY)), [29, 1, 1]);
    assert_eq!(count(&close(&mut shelf, 9 * DAY)), [0, 0, 0]);
    assert_eq!(shelf.inputs(Tier::Day, 1).len(), 2);
}

#[test]
fn a_stretch_that_could_not_be_closed_keeps_its_hour_and_day_open() {
    let mut shelf = shelf(DAY..DAY + 120);
    let sealed = shelf.seal(3 * DAY);
    sealed[1..].iter().for_each(|minute| shelf.close(Tier::Minute, *minute, held(5)));
    assert_eq!(shelf.to_close(Tier::Hour, 3 * DAY), BTreeSet::from([25]));
    shelf.close(Tier::Hour, 25, held(7));
    assert_eq!(shelf.to_close(Tier::Day, 3 * DAY), BTreeSet::new());
    assert_eq!(shelf.seal(3 * DAY), [DAY], "it is tried again");
    assert_eq!(close(&mut shelf, 3 * DAY), [(Tier::Minute, DAY), (Tier::Hour, 24), (Tier::Day, 1)]);
}

#[test]
fn what_is_closed_or_sealed_takes_no_more() {
    let mut shelf = shelf(DAY..DAY + 120);
    assert_eq!(shelf.first_open(DAY), DAY);
    shelf.seal(DAY + 3);
    assert_eq!((shelf.first_open(DAY), shelf.first_open(DAY + 2)), (DAY + 1, DAY + 3));
    close(&mut shelf, DAY + 60);
    assert_eq!(shelf.first_open(DAY + 1), DAY + 60, "there was nothing in the minute, but its hour is closed");
    close(&mut shelf, 2 * DAY);
    assert_eq!(shelf.first_open(DAY), 2 * DAY);
}

#[test]
fn a_cover_has_each_call_once_and_is_as_coarse_as_it_may() {
    let mut shelf = shelf(DAY..3 * DAY + 90);
    close(&mut shelf, 3 * DAY + 70);
    let whole = DAY..3 * DAY + 90;
    let count = |range: &Range<u32>, step| {
        let cover = shelf.cover(range, step, &[3 * DAY + 91, 3 * DAY + 81, 3 * DAY + 80]);
        let minutes = cover.iter().flat_map(|(tier, start)| tier.span(*start)).collect::<Vec<_>>();
        assert!(minutes.is_sorted_by(|one, other| one < other), "{range:?} {step:?} overlaps: {cover:?}");
        assert!(minutes.iter().all(|minute| range.contains(minute)), "{range:?} {step:?}: {cover:?}");
        Tier::ALL.map(|tier| cover.iter().filter(|(of, _)| *of == tier).count())
    };
    // Two days, an hour, fifteen minutes and one that is in the table only.
    assert_eq!(count(&whole, Tier::Day), [16, 1, 2]);
    assert_eq!(count(&whole, Tier::Hour), [16, 49, 0]);
    assert_eq!(count(&whole, Tier::Minute), [1440 + 46, 0, 0]);
    // An hour and 58 minutes before midnight, and a minute behind it.
    assert_eq!(count(&(2 * DAY - 118..2 * DAY + 1), Tier::Day), [29 + 1, 1, 0]);
    assert_eq!(count(&(DAY + 1..DAY + 2), Tier::Day), [0, 0, 0]);
}

#[test]
fn what_is_old_is_forgotten_and_what_is_too_much_goes_oldest_first() {
    let mut shelf = shelf(DAY..2 * DAY + 60);
    close(&mut shelf, 2 * DAY + 30);
    assert_eq!(shelf.held_bytes(), (720 + 15) * 5 + 24 * 7 + 7 + 15 * 10);
    shelf.forget([2 * DAY + 60, 47, 1]);
    assert_eq!(
        Tier::ALL.map(|tier| shelf.first(tier)),
        [Some(2 * DAY), Some(47), Some(1)],
        "the last hour is in none yet"
    );
    assert_eq!(shelf.held_bytes(), 15 * 5 + 7 + 7 + 15 * 10);
    assert_eq!(shelf.trim(1000), 0);
    assert_eq!(shelf.trim(15 * 10 + 7 + 7), 15, "minutes first, and their hour is not there");
    assert_eq!(shelf.trim(10), 15);
    assert_eq!(shelf.trim(0), 1, "the hour is in the day, and the day is lost");
    assert_eq!(shelf.held_bytes(), 0);
}
