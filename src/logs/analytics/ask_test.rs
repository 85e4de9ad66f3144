use super::*;

/// 2026-05-01T10:07:00Z.
const NOW: u32 = 29_627_167;
const KEPT: [u32; 3] = [NOW - 2 * 1440, (NOW / 60 - 1440) * 60, (NOW / 1440 - 800) * 1440];

fn ask(query: &str) -> Result<Ask> {
    Ask::parse(Some(&AccountId::new("acme")), query, NOW, KEPT)
}

fn range(query: &str) -> String {
    let ask = ask(query).unwrap_or_else(|error| panic!("{query}: {error}"));
    let step = ask.step.map_or("none", Tier::as_str);
    format!("{} {} {step}", timestamp(ask.range.start), timestamp(ask.range.end))
}

#[test]
fn times_are_read_in_every_spelling_and_rounded_outwards() {
    for (query, expected) in [
        ("", "2026-04-30T10:07:00Z 2026-05-01T10:08:00Z none"),
        ("from=30m", "2026-05-01T09:37:00Z 2026-05-01T10:08:00Z none"),
        ("from=-30m&to=now", "2026-05-01T09:37:00Z 2026-05-01T10:08:00Z none"),
        ("from=2026-05-01", "2026-05-01T00:00:00Z 2026-05-01T10:08:00Z none"),
        ("from=2026-05-01T08:00:30Z&to=2026-05-01T09:00:30Z", "2026-05-01T08:00:00Z 2026-05-01T09:01:00Z none"),
        ("from=2026-05-01T10%3A00%3A00%2B02:00&to=1777625999", "2026-05-01T08:00:00Z 2026-05-01T09:00:00Z none"),
        ("from=1777622400&to=1777626000000", "2026-05-01T08:00:00Z 2026-05-01T09:00:00Z none"),
        // With a step, to whole ones.
        ("from=3h&step=hour", "2026-05-01T07:00:00Z 2026-05-01T11:00:00Z hour"),
        ("from=3h&step=day", "2026-05-01T00:00:00Z 2026-05-02T00:00:00Z day"),
        ("from=3h&step=auto", "2026-05-01T07:07:00Z 2026-05-01T10:08:00Z minute"),
        ("from=7d&step=auto", "2026-04-24T10:00:00Z 2026-05-01T11:00:00Z hour"),
        ("from=15d&step=auto", "2026-04-16T00:00:00Z 2026-05-02T00:00:00Z day"),
        ("from=3d&to=70h&step=auto", "2026-04-28T10:00:00Z 2026-04-28T13:00:00Z hour"),
        // Where there are no minutes or hours any more, to what there is.
        ("from=3d", "2026-04-28T10:00:00Z 2026-05-01T10:08:00Z none"),
        ("from=3d&to=2026-04-28T11:30:00Z", "2026-04-28T10:00:00Z 2026-04-28T12:00:00Z none"),
        ("from=100d", "2026-01-21T00:00:00Z 2026-05-01T10:08:00Z none"),
        // GraphQL's.
        (
            "datetimeHour_geq=2026-05-01T07:00:00Z&datetimeHour_leq=2026-05-01T08:00:00Z&group_by=datetimeHour",
            "2026-05-01T07:00:00Z 2026-05-01T09:00:00Z hour",
        ),
        ("date_gt=2026-04-20&date_lt=2026-04-25&groupBy=date", "2026-04-21T00:00:00Z 2026-04-25T00:00:00Z day"),
        (
            "datetime_geq=2026-05-01T07:00:10Z&datetime_lt=2026-05-01T08:00:00Z",
            "2026-05-01T07:00:00Z 2026-05-01T08:00:00Z none",
        ),
    ] {
        assert_eq!(range(query), expected, "{query}");
    }
}

#[test]
fn groups_filters_and_orders_are_read() {
    let query = "group_by=provider,model,statusClass&model=gpt-4o,a+b&model=%C3%BC&status=5xx,429&cache=hit,coalesced\
                 &order_by=cost&direction=asc&limit=5";
    let read = ask(query).unwrap();
    assert_eq!(read.by, [false, false, true, true, false]);
    assert_eq!((read.by_status, read.by_cache, read.limit, read.ascending), (ByStatus::Class, false, 5, true));
    assert_eq!(read.only[Name::Model as usize], ["gpt-4o", "a b", "ü"]);
    assert_eq!(read.only[Name::Account as usize], ["acme"]);
    assert_eq!((read.only_status, read.only_cache), (vec![(500, 599), (429, 429)], vec![2, 3]));
    for (query, expected, ascending) in [
        ("", "count", false),
        ("step=day", "time", true),
        ("step=day&order_by=count", "count", false),
        ("orderBy=%5Bsum_cost_DESC%5D", "cost", false),
        ("orderBy=count_ASC", "count", true),
        ("orderBy=datetimeHour_DESC", "time", false),
        ("order_by=latencyP99", "latencyP99", false),
    ] {
        let read = ask(query).unwrap();
        let order = match read.order {
            Order::Time => "time",
            Order::By(measure) => {
                Measure::names().find(|name| std::ptr::eq(Measure::find(name).unwrap(), measure)).unwrap()
            }
        };
        assert_eq!((order, read.ascending), (expected, ascending), "{query}");
    }
    assert!(Ask::parse(None, "group_by=account&account=a,b", NOW, KEPT).unwrap().by[0]);
    assert_eq!(ask("group_by=status,statusClass").unwrap().by_status, ByStatus::Code);
}

#[test]
fn an_error_names_the_parameter_and_what_is_allowed() {
    for (query, param, words) in [
        ("grup_by=model", "grup_by", "there are from, to, step, group_by"),
        ("step=week", "step", "minute, hour, day, auto or none"),
        ("group_by=model,user", "group_by", "datetimeHour"),
        ("status=6000xx", "status", "4xx"),
        ("status=ok", "status", "429"),
        ("cache=yes", "cache", "coalesced"),
        ("order_by=price", "order_by", "totalNeurons"),
        ("direction=up", "direction", "asc or desc"),
        ("limit=0", "limit", "10000"),
        ("limit=10001", "limit", "from 1"),
        ("from=yesterday", "from", "24h"),
        ("to=-1", "to", "now"),
        ("from=2026-13-01", "from", "2026-05-01"),
        ("from=1h&to=2h", "from", "before `to`"),
        ("from=3d&step=minute", "from", "step=hour or day"),
        ("from=70d&step=hour", "from", "ask for step=day"),
        ("step=hour&group_by=date", "step", "two different steps"),
        ("account=zed", "account", "acme"),
        ("datetimeWeek_geq=1", "datetimeWeek_geq", "no parameter"),
    ] {
        let error = ask(query).err().unwrap_or_else(|| panic!("{query} is taken"));
        assert_eq!(error.param(), Some(param), "{query}: {error}");
        assert!(error.message().contains(words) && error.message().contains(param), "{query}: {error}");
    }
    assert!(ask("model=%ff").is_err());
}
