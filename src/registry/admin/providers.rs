//! Custom providers: any HTTP API under a name of the account's own.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use tracing::info;
use uuid::Uuid;

use super::super::book::{ProviderRecord, header_name};
use super::super::edit::Bench;
use super::super::view::View;
use super::{Answer, Call, Method, flag, id, missing, moment, not_found, text, wrong};
use crate::base::{Error, Millis, Result};
use crate::config::gateway::{CUSTOM, FixedProvider, MASK, is_plain_url, is_slug};

/// Of one account.
const MOST: usize = 1000;
const MOST_HEADERS: usize = 32;
/// Longest name and address, and longest text for people.
const MOST_NAME: usize = 256;
const MOST_URL: usize = 2048;
const MOST_TEXT: usize = 16_384;
/// Texts for people.
const TEXTS: [&str; 5] = ["description", "link", "logo", "curl_example", "js_example"];
/// What belongs to the connection, to the gateway, or to the caller's own authority.
const KEPT_HEADERS: [&str; 6] = ["host", "content-length", "transfer-encoding", "connection", "upgrade", "te"];

pub(super) async fn serve(mut call: Call<'_>, method: Method, path: &[&str]) -> Result<Answer> {
    match (path, method) {
        ([], Method::Get) => list(&call),
        ([], Method::Post) => {
            let fields = call.fields()?;
            create(&call, fields).await
        }
        ([id], Method::Get) => get(&call, id),
        ([id], Method::Patch | Method::Put) => {
            let fields = call.fields()?;
            update(&call, id, fields).await
        }
        ([id], Method::Delete) => delete(&call, id).await,
        ([] | [_], _) => Ok(Answer::NoMethod),
        _ => Ok(Answer::NoPath),
    }
}

fn list(call: &Call) -> Result<Answer> {
    let (view, account) = (call.registry.view(), call.account.as_str());
    let mut shown: Vec<Value> = fixed(&view, account).map(|provider| show_fixed(provider, view.fixed.since)).collect();
    let stored = view.book(account).into_iter().flat_map(|book| &book.providers);
    shown.extend(stored.filter(|record| view.fixed_provider(account, &record.slug).is_none()).map(show));
    shown.retain(|provider| {
        let text = |key: &str| provider[key].as_str().unwrap_or_default();
        let flag = |key: &str| provider[key].as_bool().unwrap_or_default();
        call.finds(&[text("id"), text("name"), text("slug")])
            && call.fits("enable", flag("enable"))
            && call.fits("beta", flag("beta"))
    });
    let mut page = call.page()?;
    Ok(Answer::Page(page.cut(shown), page))
}

fn get(call: &Call, text: &str) -> Result<Answer> {
    let (view, account, wanted) = (call.registry.view(), call.account.as_str(), id("custom provider", text)?);
    if let Some(provider) = fixed(&view, account).find(|provider| fixed_id(provider) == wanted) {
        return Ok(Answer::Result(show_fixed(provider, view.fixed.since)));
    }
    let record = view.book(account).and_then(|book| book.providers.iter().find(|record| record.id == wanted));
    record.map(|record| Answer::Result(show(record))).ok_or_else(|| not_found("custom provider", text))
}

async fn create(call: &Call<'_>, fields: Map<String, Value>) -> Result<Answer> {
    for key in ["name", "slug", "base_url"] {
        if fields.get(key).is_none_or(Value::is_null) {
            return Err(missing(key));
        }
    }
    must_be_free(call, &fields)?;
    let made = call.registry.change(call.account, move |book, bench| {
        if book.providers.len() >= MOST {
            let message = format!("an account has at most {MOST} custom providers: delete one first");
            return Err(Error::bad_input(message));
        }
        let mut record = ProviderRecord {
            id: Uuid::new_v4(),
            slug: String::new(),
            name: String::new(),
            base_url: String::new(),
            enable: false,
            about: Map::new(),
            headers: BTreeMap::new(),
            generation: book.generation(bench.now),
            created: bench.now,
            modified: bench.now,
        };
        change(&mut record, &fields, bench)?;
        must_be_alone(&book.providers, &record)?;
        info!(account = bench.account, provider = record.slug, "custom provider made");
        let shown = show(&record);
        book.providers.push(record);
        Ok(shown)
    });
    made.await.map(Answer::Result)
}

async fn update(call: &Call<'_>, text: &str, fields: Map<String, Value>) -> Result<Answer> {
    let wanted = must_be_ours(call, text)?;
    must_be_free(call, &fields)?;
    let text = text.to_owned();
    let changed = call.registry.change(call.account, move |book, bench| {
        let at = book.providers.iter().position(|record| record.id == wanted);
        let at = at.ok_or_else(|| not_found("custom provider", &text))?;
        let generation = book.generation(bench.now);
        let mut record = book.providers[at].clone();
        change(&mut record, &fields, bench)?;
        must_be_alone(&book.providers, &record)?;
        record.generation = generation;
        record.modified = bench.now;
        info!(account = bench.account, provider = record.slug, "custom provider changed");
        let shown = show(&record);
        book.providers[at] = record;
        Ok(shown)
    });
    changed.await.map(Answer::Result)
}

async fn delete(call: &Call<'_>, text: &str) -> Result<Answer> {
    let wanted = must_be_ours(call, text)?;
    let text = text.to_owned();
    let gone = call.registry.change(call.account, move |book, bench| {
        let at = book.providers.iter().position(|record| record.id == wanted);
        let record = book.providers.remove(at.ok_or_else(|| not_found("custom provider", &text))?);
        info!(account = bench.account, provider = record.slug, "custom provider deleted");
        Ok(show(&record))
    });
    gone.await.map(Answer::Result)
}

/// Puts fields into a record; what is left out stays.
fn change(record: &mut ProviderRecord, fields: &Map<String, Value>, bench: &Bench) -> Result<()> {
    if let Some(slug) = text(fields, "slug", 1..=64)? {
        if !is_slug(slug) || slug.starts_with(CUSTOM) {
            let remedy =
                format!("must be 1 to 64 letters, digits, - and _, without {CUSTOM}, which goes in front by itself");
            return Err(wrong("slug", &Value::from(slug), remedy));
        }
        slug.clone_into(&mut record.slug);
    }
    if let Some(name) = text(fields, "name", 1..=MOST_NAME)? {
        name.clone_into(&mut record.name);
    }
    if let Some(url) = text(fields, "base_url", 1..=MOST_URL)? {
        if is_plain_url(url).is_none_or(|url| url.scheme() != "https") {
            let message = "'base_url' must be an https:// address without credentials, ? and #";
            return Err(Error::bad_field("base_url", message));
        }
        url.clone_into(&mut record.base_url);
    }
    if let Some(enable) = flag(fields, "enable")? {
        record.enable = enable;
    }
    for key in TEXTS {
        if fields.get(key).is_some_and(Value::is_null) {
            record.about.remove(key);
        }
        if let Some(words) = text(fields, key, 0..=MOST_TEXT)? {
            record.about.insert(key.into(), words.into());
        }
    }
    if let Some(beta) = flag(fields, "beta")? {
        record.about.insert("beta".into(), beta.into());
    }
    match fields.get("position") {
        None | Some(Value::Null) => {}
        Some(position) if position.is_i64() => {
            record.about.insert("position".into(), position.clone());
        }
        Some(other) => return Err(wrong("position", other, "must be a whole number")),
    }
    match fields.get("headers") {
        None => {}
        Some(Value::Null) => record.headers.clear(),
        Some(written) => record.headers = headers(record, written, bench)?,
    }
    Ok(())
}

/// Extra headers, sealed: written as JSON of an object, or as an object.
fn headers(record: &ProviderRecord, written: &Value, bench: &Bench) -> Result<BTreeMap<String, String>> {
    // Nothing of it is shown: it holds keys.
    let refused = |words: &str| Error::bad_field("headers", format!("'headers' {words}"));
    let object = match written {
        Value::String(text) if text.trim().is_empty() => Some(Map::new()),
        Value::String(text) => serde_json::from_str(text).ok(),
        Value::Object(object) => Some(object.clone()),
        _ => None,
    };
    let object = object.ok_or_else(|| refused("must be a JSON object of names and texts"))?;
    if object.len() > MOST_HEADERS {
        return Err(refused(&format!("must be at most {MOST_HEADERS} names")));
    }
    let id = record.id.to_string();
    let mut sealed = BTreeMap::new();
    for (name, value) in &object {
        let name = name.to_ascii_lowercase();
        let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
        if name.is_empty() || name.len() > 128 || !name.bytes().all(token) {
            return Err(refused("must have names that HTTP allows"));
        }
        if KEPT_HEADERS.contains(&name.as_str()) || name.starts_with("cf-aig-") {
            return Err(refused(&format!("must not set {name}")));
        }
        let printable = |text: &&str| text.len() <= 8192 && text.bytes().all(|byte| (b' '..0x7f).contains(&byte));
        let value = value
            .as_str()
            .filter(printable)
            .ok_or_else(|| refused(&format!("must have a text of printable ASCII for {name}, at most 8192 bytes")))?;
        let text = match record.headers.get(&name) {
            Some(kept) if value == MASK => kept.clone(),
            None if value == MASK => {
                return Err(refused(&format!("keep what is there with {MASK}, but there is no {name}")));
            }
            _ => bench.sealer.seal(&header_name(bench.account, &id, &name), value)?,
        };
        sealed.insert(name, text);
    }
    Ok(sealed)
}

fn must_be_alone(others: &[ProviderRecord], record: &ProviderRecord) -> Result<()> {
    if others.iter().any(|other| other.id != record.id && other.slug == record.slug) {
        return Err(wrong("slug", &Value::from(record.slug.as_str()), "must be one that no other custom provider has"));
    }
    Ok(())
}

/// Refuses a slug that the file has taken.
fn must_be_free(call: &Call, fields: &Map<String, Value>) -> Result<()> {
    let slug = fields.get("slug").and_then(Value::as_str).unwrap_or_default();
    match call.registry.view().fixed_provider(call.account.as_str(), slug) {
        None => Ok(()),
        Some(fixed) => Err(written(fixed)),
    }
}

fn must_be_ours(call: &Call, text: &str) -> Result<Uuid> {
    let wanted = id("custom provider", text)?;
    let view = call.registry.view();
    match fixed(&view, call.account.as_str()).find(|provider| fixed_id(provider) == wanted) {
        None => Ok(wanted),
        Some(provider) => Err(written(provider)),
    }
}

fn written(fixed: &FixedProvider) -> Error {
    let FixedProvider { slug, origin, .. } = fixed;
    Error::bad_input(format!("provider {slug:?} is written in {origin} as [[provider]]: change it there and reload"))
}

/// Those of the file that an account has.
fn fixed<'a>(view: &'a View, account: &'a str) -> impl Iterator<Item = &'a FixedProvider> {
    view.fixed.written.providers.iter().filter(move |provider| {
        let slug = provider.slug.strip_prefix(CUSTOM);
        slug.and_then(|slug| view.fixed_provider(account, slug)).is_some_and(|counts| std::ptr::eq(counts, *provider))
    })
}

/// Follows from what is written, so that it is the same after a reload.
fn fixed_id(provider: &FixedProvider) -> Uuid {
    let owner = provider.account.as_ref().map(|account| account.as_str()).unwrap_or_default();
    let hash = blake3::hash(format!("provider\n{owner}\n{}", provider.slug).as_bytes());
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash.as_bytes()[..16]);
    uuid::Builder::from_random_bytes(bytes).into_uuid()
}

fn show_fixed(provider: &FixedProvider, since: Millis) -> Value {
    let slug = provider.slug.strip_prefix(CUSTOM).unwrap_or(&provider.slug);
    json!({
        "id": fixed_id(provider).to_string(),
        "name": slug,
        "slug": slug,
        "base_url": provider.base_url,
        "enable": true,
        "beta": false,
        "created_at": moment(since),
        "modified_at": moment(since),
    })
}

fn show(record: &ProviderRecord) -> Value {
    let mut shown = Map::new();
    for (key, text) in [("name", &record.name), ("slug", &record.slug), ("base_url", &record.base_url)] {
        shown.insert(key.into(), text.as_str().into());
    }
    shown.insert("id".into(), record.id.to_string().into());
    shown.insert("enable".into(), record.enable.into());
    shown.insert("beta".into(), false.into());
    shown.extend(record.about.clone());
    if !record.headers.is_empty() {
        let masked: Map<String, Value> = record.headers.keys().map(|name| (name.clone(), MASK.into())).collect();
        shown.insert("headers".into(), Value::Object(masked).to_string().into());
    }
    shown.insert("created_at".into(), moment(record.created).into());
    shown.insert("modified_at".into(), moment(record.modified).into());
    Value::Object(shown)
}
