use serde_json::json;

use super::*;

fn filters(raw: &str) -> Vec<Filter> {
    Query::parse(raw).unwrap().filters
}

fn number(number: Number, ranges: &[RangeInclusive<u64>]) -> Filter {
    Filter { test: Test::Number(number, ranges.to_vec()), is_negated: false }
}

fn text(text: Text, matches: &[Match]) -> Filter {
    Filter { test: Test::Text(text, matches.to_vec()), is_negated: false }
}

fn is(text: &str) -> Match {
    Match::Is(text.into())
}

#[test]
fn a_new_filter_begins_at_each_key_and_values_are_repeated() {
    let raw = "filters.key=provider&filters.operator=eq&filters.value=openai&filters.value=a%26b&filters.key=cost&filters.operator=gt&filters.value=1";
    let one_usd = 1_000_000_000_000 / 11;
    assert_eq!(
        filters(raw),
        [text(Text::Provider, &[is("openai"), is("a&b")]), number(Number::Cost, &[one_usd + 1..=u64::MAX])]
    );
    let list = json!([{ "key": "provider", "operator": "eq", "value": ["openai", "a&b"] }, { "key": "cost", "operator": "gt", "value": [1] }]);
    assert_eq!(Query::of_filters(&list).unwrap().filters, filters(raw), "as JSON");
    let encoded: String =
        percent_encoding::utf8_percent_encode(&list.to_string(), percent_encoding::NON_ALPHANUMERIC).collect();
    assert_eq!(filters(&format!("filters={encoded}")), filters(raw), "as JSON in the query string");
}

#[test]
fn keys_operators_and_values_in_columns_belong_together_where_that_can_be_told() {
    let rows = "filters.key=cost&filters.operator=gt&filters.value=0.1&filters.key=provider&filters.operator=eq\
                &filters.value=openai&filters.value=groq";
    let columns = "filters.key=cost&filters.key=provider&filters.operator=gt&filters.operator=eq&filters.value=0.1\
                   &filters.value=openai&filters.value=groq";
    assert_eq!(filters(columns), filters(rows));
    let turned = "filters.key=provider&filters.key=cost&filters.operator=eq&filters.operator=gt&filters.value=openai\
                  &filters.value=groq&filters.value=0.1";
    assert_eq!(filters(turned), filters(rows).into_iter().rev().collect::<Vec<_>>());
    let each =
        "filters.key=provider&filters.key=model&filters.key=success&filters.value=a&filters.value=b&filters.value=true";
    assert_eq!(
        filters(each),
        [
            text(Text::Provider, &[is("a")]),
            text(Text::Model, &[is("b")]),
            number(Number::Success, std::slice::from_ref(&(1..=1)))
        ]
    );
    for (raw, says) in [
        ("filters.key=provider&filters.key=model&filters.value=a&filters.value=b&filters.value=c", "as JSON"),
        ("filters.key=provider&filters.key=model&filters.operator=eq&filters.value=a&filters.value=b", "for each key"),
        ("filters.key=provider&filters.key=model&filters.value=a", "for each key"),
        ("filters.key=cost&filters.key=success&filters.value=a&filters.value=true", "not \"a\""),
        ("filters.key=cost&filters.key=success&filters.value=1&filters.value=2&filters.value=x", "must be"),
    ] {
        let error = Query::parse(raw).unwrap_err();
        assert!(error.message().contains(says), "{raw}: {error}");
    }
}

#[test]
fn numbers_are_read_in_the_units_of_the_wire() {
    let rows: [(&str, &str, &str, Number, RangeInclusive<u64>); 16] = [
        ("duration", "eq", "12", Number::Duration, 12_000..=12_000),
        ("duration", "lt", "12", Number::Duration, 0..=11_999),
        ("duration", "gt", "12.345", Number::Duration, 12_346..=u64::MAX),
        ("cost", "eq", "0.000011", Number::Cost, 1_000_000..=1_000_000),
        ("cost", "eq", "0.011", Number::Cost, 1_000_000_000..=1_000_000_000),
        ("cost", "lt", "0.011", Number::Cost, 0..=999_999_999),
        ("cost", "gt", "-1", Number::Cost, 0..=u64::MAX),
        ("tokens", "eq", "7", Number::Tokens, 7..=7),
        ("tokens_in", "lt", "7", Number::TokensIn, 0..=6),
        ("tokens_out", "gt", "7", Number::TokensOut, 8..=u64::MAX),
        ("status_code", "gt", "399", Number::Status, 400..=u64::MAX),
        ("success", "eq", "true", Number::Success, 1..=1),
        ("cached", "eq", "false", Number::Cached, 0..=0),
        ("authentication", "eq", "1", Number::Authenticated, 1..=1),
        ("created_at", "gt", "2023-11-14T22:13:20Z", Number::At, 1_700_000_000_001..=u64::MAX),
        ("created_at", "lt", "2023-11-14", Number::At, 0..=1_699_919_999_999),
    ];
    for (key, operator, value, column, range) in rows {
        let raw = format!("filters.key={key}&filters.operator={operator}&filters.value={value}");
        assert_eq!(filters(&raw), [number(column, &[range])], "{raw}");
    }
    for raw in ["filters.key=cost&filters.operator=lt&filters.value=0", "filters.key=tokens&filters.value=1.5"] {
        let Test::Number(_, ranges) = &filters(raw)[0].test else { panic!("{raw}") };
        assert!(ranges[0].is_empty(), "nothing is {raw}");
    }
}

#[test]
fn every_key_of_the_contract_is_taken() {
    let keys = "id created_at request_content_type response_content_type request_type success cached provider model model_type cost tokens \
        tokens_in tokens_out duration feedback event_id metadata.key metadata.value authentication wholesale compatibilityMode dlp_action \
        user_agent status_code";
    for key in keys.split_whitespace() {
        let value = match key {
            "id" => "01HF7YAT00ABCDEFGHJKMNPQRS",
            "created_at" => "2024-01-01",
            "success" | "cached" | "authentication" | "wholesale" | "compatibilityMode" => "true",
            _ => "1",
        };
        for operator in ["eq", "neq"] {
            let filter = &filters(&format!("filters.key={key}&filters.operator={operator}&filters.value={value}"))[0];
            assert_eq!(filter.is_negated, operator == "neq", "{key}");
        }
    }
}

#[test]
fn texts_ids_and_what_we_have_not_are_compared_as_they_can_be() {
    let one = |raw: &str| filters(raw).remove(0);
    let contains = one("filters.key=model&filters.operator=contains&filters.value=llama");
    assert_eq!(contains.test, Test::Text(Text::Model, vec![Match::Contains("llama".into())]));
    assert_eq!(one("filters.key=metadata.key&filters.value=user").test, Test::MetadataKey(vec![is("user")]));
    assert_eq!(
        one("filters.key=metadata.value&filters.operator=lt&filters.value=5").test,
        Test::MetadataValue(vec![Match::Below("5".into())])
    );
    assert_eq!(one("filters.key=feedback&filters.value=-1&filters.value=1").test, Test::Feedback(vec![0..=0, 2..=2]));
    assert_eq!(one("filters.key=wholesale&filters.value=true").test, Test::Always(false));
    assert_eq!(one("filters.key=wholesale&filters.value=false").test, Test::Always(true));
    let compat = |value: &str| one(&format!("filters.key=compatibilityMode&filters.value={value}"));
    assert_eq!((compat("true").is_negated, compat("false").is_negated), (false, true));
    let id = LogId::parse("01HF7YAT00ABCDEFGHJKMNPQRS").unwrap();
    assert_eq!(
        one("filters.key=id&filters.value=01hf7yat00abcdefghjkmnpqrs").test,
        Test::Id(vec![id.number()..=id.number()])
    );
    assert_eq!(
        one("filters.key=id&filters.operator=contains&filters.value=PQRS").test,
        Test::IdPart(vec![(0b10110_10111_11000_11001, 4)])
    );
    let below = one("filters.key=id&filters.operator=lt&filters.value=2023-11-14T22:13:20Z").test;
    assert_eq!(below, Test::Id(vec![0..=(1_700_000_000_000u128 << 80) - 1]));
}

#[test]
fn the_older_forms_are_filters_too() {
    let raw = "start_date=2023-11-14&end_date=2023-11-15T00:00:00Z&min_cost=0.000011&max_cost=0.011&min_duration=1&max_duration=2\
        &min_tokens_in=1&max_tokens_out=2&min_total_tokens=3&cached=true&success=false&feedback=1&model=m&model_type=t&provider=p\
        &request_content_type=a&response_content_type=b&direction=asc";
    let wanted = [
        number(Number::At, &[1_699_920_000_000..=u64::MAX]),
        number(Number::At, &[0..=1_700_006_400_000]),
        number(Number::Cost, &[1_000_000..=u64::MAX]),
        number(Number::Cost, &[0..=1_000_000_000]),
        number(Number::Duration, &[1000..=u64::MAX]),
        number(Number::Duration, &[0..=2000]),
        number(Number::TokensIn, &[1..=u64::MAX]),
        number(Number::TokensOut, &[0..=2]),
        number(Number::Tokens, &[3..=u64::MAX]),
        number(Number::Cached, &[1..=1]),
        number(Number::Success, &[0..=0]),
        Filter { test: Test::Feedback(vec![2..=2]), is_negated: false },
        text(Text::Model, &[is("m")]),
        text(Text::ModelType, &[is("t")]),
        text(Text::Provider, &[is("p")]),
        text(Text::RequestContentType, &[is("a")]),
        text(Text::ResponseContentType, &[is("b")]),
    ];
    let query = Query::parse(raw).unwrap();
    assert_eq!(query.filters, wanted);
    assert!(!query.is_descending);
}

#[test]
fn pages_orders_and_the_rest_are_read() {
    let query = Query::parse(
        "?page=3&per_page=50&order_by=model&order_by_direction=asc&meta_info=true&search=a+b&limit=7&unknown=1",
    )
    .unwrap();
    let wanted = Query {
        filters: vec![],
        search: Some("a b".into()),
        order: Order::Text(Text::Model),
        is_descending: false,
        page: 3,
        per_page: 50,
        meta_info: true,
        limit: Some(7),
    };
    assert_eq!((query.skipped(), query), (100, wanted));
    assert_eq!(Query::parse("").unwrap(), Query::default());
    for (name, order) in [
        ("created_at", Order::Number(Number::At)),
        ("provider", Order::Text(Text::Provider)),
        ("model_type", Order::Text(Text::ModelType)),
        ("success", Order::Number(Number::Success)),
        ("cached", Order::Number(Number::Cached)),
        ("cost", Order::Number(Number::Cost)),
        ("tokens", Order::Number(Number::Tokens)),
        ("duration", Order::Number(Number::Duration)),
        ("feedback", Order::Feedback),
    ] {
        assert_eq!(Query::parse(&format!("order_by={name}")).unwrap().order, order);
    }
}

#[test]
fn what_is_wrong_is_named_with_what_it_may_be() {
    let rows = [
        ("page=0", "page", "from 1 to"),
        ("per_page=1001", "per_page", "1000"),
        ("page=20001&per_page=50", "page", "created_at"),
        ("page=18446744073709551615&per_page=1000", "page", "created_at"),
        ("order_by=size", "order_by", "created_at, provider"),
        ("order_by=status_code", "order_by", "created_at, provider"),
        ("order_by_direction=up", "order_by_direction", "asc or desc"),
        ("meta_info=yes", "meta_info", "true or false"),
        ("limit=0", "limit", "1000000"),
        ("min_cost=x", "min_cost", "a number"),
        ("start_date=soon", "start_date", "2026-01-31"),
        ("filters.value=1", "filters.value", "follow the filters.key"),
        ("filters.key=nope&filters.value=1", "filters.key", "tokens_in"),
        ("filters.key=cost&filters.operator=is&filters.value=1", "filters.operator", "eq, neq, contains, lt or gt"),
        ("filters.key=cost&filters.operator=contains&filters.value=1", "filters.operator", "for texts"),
        ("filters.key=cost&filters.operator=gt", "filters.value", "1 to 200"),
        ("filters.key=cost&filters.value=NaN", "filters.value", "a number"),
        ("filters.key=success&filters.value=maybe", "filters.value", "true or false"),
        ("filters.key=feedback&filters.value=2", "filters.value", "-1, 0 or 1"),
        ("filters.key=id&filters.value=x", "filters.value", "26 characters"),
        ("filters.key=id&filters.operator=contains&filters.value=u", "filters.value", "some of the 26"),
        ("filters={}", "filters", "array"),
        ("filters=[", "filters", "JSON"),
        ("filters=[{}]", "filters.key", "each filter"),
    ];
    for (raw, param, words) in rows {
        let error = Query::parse(raw).unwrap_err();
        assert_eq!(error.param(), Some(param), "{raw}: {error}");
        assert!(error.message().contains(words), "{raw}: {error}");
    }
}
