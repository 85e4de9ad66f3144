//! Gateways: made, changed and shown in the fields of the wire.

use serde_json::{Map, Value};
use tracing::info;
use uuid::Uuid;

use super::super::book::{GatewayRecord, setting_name};
use super::super::edit::{Bench, defaults, insert};
use super::super::view::{DEFAULT, View, checked, compile_guard};
use super::{Answer, Call, Method, datasets, evaluations, keys, missing, moment, not_found, routes, wrong};
use crate::base::{Error, Millis, Result};
use crate::config::gateway::{FixedGateway, MASK, each_secret, is_slug};

/// Of one account; enough for any, and few enough to be held.
const MOST: usize = 1000;
/// What a new gateway must say.
const NEEDED: [&str; 5] =
    ["cache_invalidate_on_update", "cache_ttl", "collect_logs", "rate_limiting_interval", "rate_limiting_limit"];

pub(super) async fn serve(mut call: Call<'_>, method: Method, path: &[&str]) -> Result<Answer> {
    match (path, method) {
        ([], Method::Get) => list(&call),
        ([], Method::Post) => {
            let fields = call.fields()?;
            create(&call, fields).await
        }
        ([], _) => Ok(Answer::NoMethod),
        ([id], Method::Get) => get(&call, id),
        ([id], Method::Put | Method::Patch) => {
            let fields = call.fields()?;
            update(&call, id, fields).await
        }
        ([id], Method::Delete) => delete(&call, id).await,
        ([id, "url"], Method::Get) => url(&call, id, None),
        ([id, "url", provider], Method::Get) => url(&call, id, Some(provider)),
        ([id, "provider_configs", rest @ ..], _) => {
            must_exist(&call, id)?;
            keys::serve(call, method, id, rest).await
        }
        ([id, "routes", rest @ ..], _) => {
            must_exist(&call, id)?;
            routes::serve(call, method, id, rest).await
        }
        ([id, "datasets", rest @ ..], _) => {
            must_exist(&call, id)?;
            datasets::serve(call, method, id, rest).await
        }
        ([id, "evaluations", rest @ ..], _) => {
            must_exist(&call, id)?;
            evaluations::serve(call, method, id, rest).await
        }
        ([_] | [_, "url"] | [_, "url", _], _) => Ok(Answer::NoMethod),
        _ => Ok(Answer::NoPath),
    }
}

fn list(call: &Call) -> Result<Answer> {
    let (view, account) = (call.registry.view(), call.account.as_str());
    let mut shown: Vec<(String, Value)> = Vec::new();
    for gateway in &view.fixed.written.gateways {
        // An account's own block hides everybody's of the same name.
        let counts = view.fixed_gateway(account, &gateway.id).is_some_and(|counts| std::ptr::eq(counts, gateway));
        if counts {
            shown.push((gateway.id.clone(), show_fixed(account, gateway, view.fixed.since)));
        }
    }
    for (id, record) in view.book(account).into_iter().flat_map(|book| &book.gateways) {
        if view.fixed_gateway(account, id).is_none() {
            shown.push((id.clone(), show(account, id, record)));
        }
    }
    shown.retain(|(id, _)| call.finds(&[id]));
    shown.sort_by(|(one, _), (other, _)| one.cmp(other));
    let mut page = call.page()?;
    let list = page.cut(shown).into_iter().map(|(_, gateway)| gateway).collect();
    Ok(Answer::Page(list, page))
}

fn get(call: &Call, id: &str) -> Result<Answer> {
    let (view, account) = (call.registry.view(), call.account.as_str());
    if let Some(fixed) = view.fixed_gateway(account, id) {
        return Ok(Answer::Result(show_fixed(account, fixed, view.fixed.since)));
    }
    let record = view.book(account).and_then(|book| book.gateways.get(id));
    record.map(|record| Answer::Result(show(account, id, record))).ok_or_else(|| not_found("gateway", id))
}

async fn create(call: &Call<'_>, fields: Map<String, Value>) -> Result<Answer> {
    let id = match fields.get("id") {
        Some(Value::String(id)) if is_slug(id) => id.clone(),
        Some(other) => {
            return Err(wrong("id", other, "must be 1 to 64 letters, digits, - and _, not beginning with -"));
        }
        None => return Err(missing("id")),
    };
    if let Some(key) = NEEDED.iter().find(|key| !fields.contains_key(**key)) {
        return Err(missing(key));
    }
    must_be_ours(call, &id)?;
    let made = call.registry.change(call.account, move |book, bench| {
        if book.gateways.contains_key(&id) {
            return Err(Error::bad_field(
                "id",
                format!("gateway {id:?} is there already: update it, or choose another id"),
            ));
        }
        if book.gateways.len() >= MOST {
            return Err(Error::bad_input(format!("an account has at most {MOST} gateways: delete one first")));
        }
        let fields = settle(merge(defaults(), &fields), None, bench, &id)?;
        let record = insert(book, bench, &id, fields);
        info!(account = bench.account, gateway = id, "gateway made");
        Ok(show(bench.account, &id, &record))
    });
    made.await.map(Answer::Result)
}

/// Fields that are left out stay what they were: a client that is older than a field must not switch it off.
async fn update(call: &Call<'_>, id: &str, fields: Map<String, Value>) -> Result<Answer> {
    must_be_ours(call, id)?;
    if let Some(other) = fields.get("id").filter(|other| other.as_str() != Some(id)) {
        return Err(wrong("id", other, format_args!("must be {id:?} as in the path: a gateway keeps its name")));
    }
    let id = id.to_owned();
    let changed = call.registry.change(call.account, move |book, bench| {
        let old = book.gateways.get(&id).ok_or_else(|| not_found("gateway", &id))?;
        let fields = settle(merge(old.fields.clone(), &fields), Some(&old.fields), bench, &id)?;
        let empties = fields.get("cache_invalidate_on_update") == Some(&Value::Bool(true));
        let fresh = book.generation(bench.now);
        let record = book.gateways.get_mut(&id).ok_or_else(|| not_found("gateway", &id))?;
        record.fields = fields;
        record.modified = bench.now;
        if empties {
            record.generation = fresh;
        }
        info!(account = bench.account, gateway = id, "gateway changed");
        Ok(show(bench.account, &id, record))
    });
    changed.await.map(Answer::Result)
}

async fn delete(call: &Call<'_>, id: &str) -> Result<Answer> {
    must_be_ours(call, id)?;
    let id = id.to_owned();
    let gone = call.registry.change(call.account, move |book, bench| {
        let record = book.gateways.remove(&id).ok_or_else(|| not_found("gateway", &id))?;
        book.keys.retain(|key| key.gateway != id);
        book.routes.retain(|route| route.gateway != id);
        book.datasets.retain(|dataset| dataset.gateway != id);
        book.evaluations.retain(|evaluation| evaluation.gateway != id);
        info!(account = bench.account, gateway = id, "gateway deleted, and what belonged to it");
        Ok(show(bench.account, &id, &record))
    });
    gone.await.map(Answer::Result)
}

fn url(call: &Call, id: &str, provider: Option<&str>) -> Result<Answer> {
    must_exist(call, id)?;
    let mut url = format!("{}/v1/{}/{id}", call.public_base.trim_end_matches('/'), call.account);
    // "universal" names no provider, but the gateway itself.
    if let Some(provider) = provider.filter(|provider| *provider != "universal") {
        if !is_slug(provider) {
            return Err(wrong("provider", &Value::from(provider), "must be the slug of a provider"));
        }
        url = format!("{url}/{provider}");
    }
    Ok(Answer::Result(url.into()))
}

fn exists(view: &View, account: &str, id: &str) -> bool {
    view.fixed_gateway(account, id).is_some() || view.book(account).is_some_and(|book| book.gateways.contains_key(id))
}

fn must_exist(call: &Call, id: &str) -> Result<()> {
    let there = exists(&call.registry.view(), call.account.as_str(), id);
    if there { Ok(()) } else { Err(not_found("gateway", id)) }
}

/// What the file says, the file's author changes.
fn must_be_ours(call: &Call, id: &str) -> Result<()> {
    match call.registry.view().fixed_gateway(call.account.as_str(), id) {
        None => Ok(()),
        Some(fixed) => Err(Error::bad_input(format!(
            "gateway {id:?} is written in {} as [[gateway]]: change it there and reload",
            fixed.origin
        ))),
    }
}

/// Fields that are known, over those that are there; null takes a field back to its default.
fn merge(mut fields: Map<String, Value>, new: &Map<String, Value>) -> Map<String, Value> {
    let defaults = defaults();
    for (key, default) in &defaults {
        match new.get(key) {
            None => {}
            Some(Value::Null) => {
                fields.insert(key.clone(), default.clone());
            }
            Some(value) => {
                fields.insert(key.clone(), value.clone());
            }
        }
    }
    let rules = fields.get_mut("spend_limits").and_then(|limits| limits.get_mut("rules")).and_then(Value::as_array_mut);
    for (index, rule) in rules.into_iter().flatten().enumerate() {
        if let Some(rule) = rule.as_object_mut().filter(|rule| !rule.contains_key("id")) {
            rule.insert("id".into(), format!("rule-{}", index + 1).into());
        }
    }
    fields
}

/// Checks fields and seals the secrets among them. A secret that is masked is the one that was there; so is one that came sealed
/// with the old fields.
fn settle(
    mut fields: Map<String, Value>,
    old: Option<&Map<String, Value>>,
    bench: &Bench,
    id: &str,
) -> Result<Map<String, Value>> {
    let mut kept: Vec<(String, String)> = Vec::new();
    if let Some(old) = old {
        each_secret(&mut old.clone(), |label, sealed| {
            kept.push((label.to_owned(), sealed.clone()));
            Ok(())
        })?;
    }
    let same = |label: &str, text: &str| {
        let before = kept.iter().find(|(name, _)| name == label).map(|(_, sealed)| sealed);
        before.filter(|sealed| text == MASK || text == sealed.as_str())
    };
    let mut open = fields.clone();
    each_secret(&mut open, |label, text| {
        match same(label, text) {
            Some(sealed) => {
                bench.sealer.open(&setting_name(bench.account, id, label), sealed)?.expose().clone_into(text)
            }
            None if text == MASK => {
                return Err(Error::bad_input(format!(
                    "{label}: {MASK} keeps a secret that is there, and there is none: send it"
                )));
            }
            None => {}
        }
        Ok(())
    })?;
    let settings = checked(&open)?;
    compile_guard(&settings)?;
    each_secret(&mut fields, |label, text| {
        *text = match same(label, text) {
            Some(sealed) => sealed.clone(),
            None => bench.sealer.seal(&setting_name(bench.account, id, label), text)?,
        };
        Ok(())
    })?;
    Ok(fields)
}

fn show(account: &str, id: &str, record: &GatewayRecord) -> Value {
    let mut fields = merge(defaults(), &record.fields);
    mask(&mut fields);
    whole(account, id, fields, record.internal, record.created, record.modified)
}

fn show_fixed(account: &str, fixed: &FixedGateway, since: Millis) -> Value {
    let mut fields = defaults();
    fields.insert("authentication".into(), true.into());
    let fields = merge(fields, &fixed.fields);
    let hash = blake3::hash(format!("{account}\n{}", fixed.id).as_bytes());
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash.as_bytes()[..16]);
    let internal = uuid::Builder::from_random_bytes(bytes).into_uuid();
    whole(account, &fixed.id, fields, internal, since, since)
}

fn mask(fields: &mut Map<String, Value>) {
    // Masking does not fail.
    let _ = each_secret(fields, |_, text| {
        MASK.clone_into(text);
        Ok(())
    });
}

fn whole(
    account: &str,
    id: &str,
    fields: Map<String, Value>,
    internal: Uuid,
    created: Millis,
    modified: Millis,
) -> Value {
    let mut whole = Map::new();
    whole.insert("id".into(), id.into());
    for key in ["account_id", "account_tag"] {
        whole.insert(key.into(), account.into());
    }
    whole.insert("internal_id".into(), internal.to_string().into());
    whole.insert("is_default".into(), (id == DEFAULT).into());
    // An object or nothing: clients cannot read it as null.
    whole.extend(fields.into_iter().filter(|(key, value)| key != "dlp" || !value.is_null()));
    whole.insert("created_at".into(), moment(created).into());
    whole.insert("modified_at".into(), moment(modified).into());
    Value::Object(whole)
}
