use super::*;
use crate::fallback::Class;

const START: Millis = Millis(1_750_000_000_000);

fn target(model: &str) -> Target {
    Target { provider: "p".into(), model: model.into() }
}

fn after(ms: u64) -> Millis {
    Millis(START.0 + ms)
}

fn show(plan: &[Planned]) -> String {
    let word = |planned: &Planned| match planned.pass {
        Pass::Closed => format!("{}", planned.index),
        Pass::Probe(_) => format!("{} probe", planned.index),
        Pass::Later => format!("{} later", planned.index),
        Pass::Anyway => format!("{} anyway", planned.index),
    };
    plan.iter().map(word).collect::<Vec<_>>().join(", ")
}

async fn fail(fallback: &Fallback, model: &str, class: Class, times: usize, now: Millis) {
    for _ in 0..times {
        fallback.settle(&target(model), Pass::Closed, Outcome::Failed(class), now);
    }
    // Messages are handled in order: once this is answered, those are done.
    fallback.health(now).await.unwrap();
}

#[actix::test]
async fn a_target_that_fails_is_left_out_and_probed_by_one_call_at_a_time() {
    let fallback = Fallback::start(Policy::default());
    let targets = [target("a"), target("b")];
    assert_eq!(show(&fallback.plan(&targets, START).await), "0, 1");
    fail(&fallback, "a", Class::Overload, 5, START).await;
    assert_eq!(show(&fallback.plan(&targets, after(4999)).await), "1");
    let mut first = fallback.plan(&targets, after(5000)).await;
    assert_eq!(show(&first), "0 probe, 1");
    assert_eq!(show(&fallback.plan(&targets, after(5000)).await), "1");
    let passes = [target("b"), target("a")];
    assert_eq!(show(&fallback.plan(&passes, after(5000)).await), "0");
    drop(first);
    fallback.health(START).await.unwrap();
    first = fallback.plan(&targets, after(5000)).await;
    assert_eq!(show(&first), "0 probe, 1");
    fallback.settle(&targets[0], first.remove(0).pass, Outcome::Answered, after(5100));
    fallback.health(START).await.unwrap();
    assert_eq!(show(&fallback.plan(&targets, after(5100)).await), "0, 1");
}

#[actix::test]
async fn a_probe_comes_back_from_who_leaves_before_it_is_handed_over() {
    let fallback = Fallback::start(Policy::default());
    let a = target("a");
    fail(&fallback, "a", Class::Overload, 5, START).await;
    let asking = loop {
        let mut asking = Box::pin(fallback.probe(&a, after(5000)));
        let waits = std::future::poll_fn(|cx| std::task::Poll::Ready(asking.as_mut().poll(cx).is_pending())).await;
        if waits {
            break asking;
        }
        // The actor was quicker than the first look: its probe is on its way back.
        fallback.health(START).await.unwrap();
    };
    let health = fallback.health(after(5000)).await.unwrap();
    assert_eq!(health[0].rest, Rest::Probing, "{health:?}");
    drop(asking);
    fallback.health(START).await.unwrap();
    assert!(matches!(fallback.probe(&a, after(5000)).await, Some(Pass::Probe(_))));
}

#[actix::test]
async fn a_probe_that_nobody_may_need_is_not_taken_before_its_turn() {
    let fallback = Fallback::start(Policy::default());
    fail(&fallback, "b", Class::Transport, 5, START).await;
    let targets = [target("a"), target("b")];
    let plan = fallback.plan(&targets, after(6000)).await;
    assert_eq!(show(&plan), "0, 1 later");
    let probe = fallback.probe(&targets[1], after(6000)).await;
    assert!(matches!(probe, Some(Pass::Probe(_))));
    assert!(fallback.probe(&targets[1], after(6000)).await.is_none());
    drop(probe);
    fallback.health(START).await.unwrap();
    assert!(matches!(fallback.probe(&targets[0], after(6000)).await, Some(Pass::Closed)));
    let probe = fallback.probe(&targets[1], after(6000)).await.unwrap();
    fallback.settle(&targets[1], probe, Outcome::Abandoned, after(6000));
    fallback.health(START).await.unwrap();
    let probe = fallback.probe(&targets[1], after(6000)).await.unwrap();
    fallback.settle(&targets[1], probe, Outcome::Failed(Class::Timeout), after(6000));
    fallback.health(START).await.unwrap();
    assert!(fallback.probe(&targets[1], after(15_999)).await.is_none());
    assert!(fallback.probe(&targets[1], after(16_000)).await.is_some());
}

#[actix::test]
async fn when_all_rest_the_best_is_tried_or_none_as_the_policy_says() {
    let fallback = Fallback::start(Policy::default());
    let targets = [target("a"), target("b")];
    fail(&fallback, "a", Class::Billing, 1, START).await;
    fail(&fallback, "b", Class::Overload, 5, START).await;
    assert_eq!(show(&fallback.plan(&targets, after(1000)).await), "1 anyway");
    fallback.reconfigure(Policy { all_rest: AllRest::Refuse, ..Policy::default() }).await.unwrap();
    assert_eq!(show(&fallback.plan(&targets, after(1000)).await), "");
    assert_eq!(show(&fallback.plan(&[], after(1000)).await), "");
    fallback.settle(&targets[1], Pass::Anyway, Outcome::Answered, after(2000));
    fallback.health(START).await.unwrap();
    assert_eq!(show(&fallback.plan(&targets, after(2000)).await), "1 probe");
}

#[actix::test]
async fn what_is_not_the_target_s_fault_does_not_count() {
    let fallback = Fallback::start(Policy::default());
    for class in [Class::Quota, Class::Caller, Class::ContextTooLong, Class::Refused] {
        fail(&fallback, "a", class, 50, START).await;
    }
    (0..50).for_each(|_| fallback.settle(&target("a"), Pass::Closed, Outcome::Abandoned, START));
    // Answers between failures, counted without the actor.
    for _ in 0..10 {
        fail(&fallback, "a", Class::Overload, 4, START).await;
        (0..10).for_each(|_| fallback.settle(&target("a"), Pass::Closed, Outcome::Answered, START));
    }
    assert_eq!(show(&fallback.plan(&[target("a")], START).await), "0");
    let health = fallback.health(START).await.unwrap();
    let a = &health[0];
    assert_eq!((a.rest, a.answered, a.failed, a.rests), (Rest::None, 100, 40, 0));
    fail(&fallback, "a", Class::Credential, 1, START).await;
    assert_eq!(fallback.health(START).await.unwrap()[0].rest, Rest::Until(after(60_000)));
}

#[actix::test]
async fn retries_of_a_provider_are_budgeted_over_its_targets() {
    let fallback = Fallback::start(Policy::default());
    assert!(fallback.may_retry(&target("unknown"), START));
    for model in ["a", "b"] {
        fallback.settle(&target(model), Pass::Closed, Outcome::Answered, START);
    }
    fallback.health(START).await.unwrap();
    (0..98).for_each(|_| fallback.settle(&target("a"), Pass::Closed, Outcome::Answered, START));
    let taken = (0..100).filter(|_| fallback.may_retry(&target("b"), START)).count();
    assert_eq!(taken, 25);
}

#[actix::test]
async fn as_many_targets_are_watched_as_there_is_room_for_and_those_that_rest_stay() {
    let fallback = Fallback::start(Policy::default());
    fail(&fallback, "bad", Class::Credential, 1, START).await;
    for n in 0..MAX_TARGETS + 10 {
        fallback.settle(&target(&n.to_string()), Pass::Closed, Outcome::Answered, after(n as u64));
        if n % 100 == 0 {
            fallback.health(START).await.unwrap();
        }
    }
    let health = fallback.health(START).await.unwrap();
    assert_eq!(health.len(), MAX_TARGETS);
    let is_watched = |model: &str| health.iter().any(|health| *health.target.model == *model);
    assert_eq!([is_watched("bad"), is_watched("3"), is_watched("1000")], [true, false, true]);
    assert_eq!(fallback.dropped(), 0);
}
