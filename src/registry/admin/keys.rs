//! Stored keys of providers (`provider_configs`): what comes in is sealed, and only its last letters ever come out.

use serde_json::{Map, Value, json};
use tracing::info;
use uuid::Uuid;

use super::super::book::{Book, KeyRecord, key_name};
use super::super::edit::Bench;
use super::{Answer, Call, Method, flag, id, missing, moment, not_found, text, wrong};
use crate::base::{Error, Result, Secret};
use crate::config::gateway::{CUSTOM, PROVIDERS, canonical, is_slug};

/// Of one account.
const MOST: usize = 10_000;
const MOST_SECRET: usize = 16_384;
/// A secret this long may show its last letters.
const SHOWN: usize = 20;

pub(super) async fn serve(mut call: Call<'_>, method: Method, gateway: &str, path: &[&str]) -> Result<Answer> {
    match (path, method) {
        ([], Method::Get) => list(&call, gateway),
        ([], Method::Post) => {
            let fields = call.fields()?;
            create(&call, gateway, fields).await
        }
        ([id], Method::Get) => get(&call, gateway, id),
        ([id], Method::Put | Method::Patch) => {
            let fields = call.fields()?;
            update(&call, gateway, id, fields).await
        }
        ([id], Method::Delete) => delete(&call, gateway, id).await,
        ([] | [_], _) => Ok(Answer::NoMethod),
        _ => Ok(Answer::NoPath),
    }
}

fn list(call: &Call, gateway: &str) -> Result<Answer> {
    let view = call.registry.view();
    let keys = view.book(call.account.as_str()).into_iter().flat_map(|book| &book.keys);
    let keys = keys.filter(|key| key.gateway == gateway && call.finds(&[&key.alias, &key.provider]));
    let mut page = call.page()?;
    Ok(Answer::Page(page.cut(keys.map(show).collect()), page))
}

fn get(call: &Call, gateway: &str, text: &str) -> Result<Answer> {
    let (view, wanted) = (call.registry.view(), id("provider config", text)?);
    let book = view.book(call.account.as_str());
    let key = book.and_then(|book| book.keys.iter().find(|key| key.id == wanted && key.gateway == gateway));
    key.map(|key| Answer::Result(show(key))).ok_or_else(|| not_found("provider config", text))
}

async fn create(call: &Call<'_>, gateway: &str, fields: Map<String, Value>) -> Result<Answer> {
    let gateway = gateway.to_owned();
    let made = call.registry.change(call.account, move |book, bench| {
        let alias = text(&fields, "alias", 1..=64)?.ok_or_else(|| missing("alias"))?;
        let provider = text(&fields, "provider_slug", 1..=80)?.ok_or_else(|| missing("provider_slug"))?;
        let provider = known(provider)?;
        if book.key(&gateway, provider, alias).is_some() {
            let message = format!(
                "a key of {provider} with alias {alias:?} is there already: update it, or choose another alias"
            );
            return Err(Error::bad_field("alias", message));
        }
        let secret = secret(&fields, book, bench)?.ok_or_else(|| missing("secret"))?;
        let default = flag(&fields, "default_config")?.unwrap_or(false);
        let at = put(book, bench, &gateway, provider, alias, default, &secret)?;
        limits(&mut book.keys[at], &fields)?;
        Ok(show(&book.keys[at]))
    });
    made.await.map(Answer::Result)
}

async fn update(call: &Call<'_>, gateway: &str, text_id: &str, fields: Map<String, Value>) -> Result<Answer> {
    let (wanted, gateway, text_id) = (id("provider config", text_id)?, gateway.to_owned(), text_id.to_owned());
    let changed = call.registry.change(call.account, move |book, bench| {
        let key = book.keys.iter().find(|key| key.id == wanted && key.gateway == gateway);
        let key = key.cloned().ok_or_else(|| not_found("provider config", &text_id))?;
        if let Some(other) = text(&fields, "provider_slug", 1..=80)?.filter(|other| canonical(other) != key.provider) {
            let remedy = format!("must be {:?} as before: make another config for another provider", key.provider);
            return Err(wrong("provider_slug", &Value::from(other), remedy));
        }
        let alias = text(&fields, "alias", 1..=64)?.unwrap_or(&key.alias).to_owned();
        if alias != key.alias && book.key(&gateway, &key.provider, &alias).is_some() {
            return Err(wrong("alias", &Value::from(alias), "must be one that no other key of this provider has"));
        }
        let fresh = secret(&fields, book, bench)?;
        let secret = match &fresh {
            Some(fresh) => fresh.clone(),
            None => bench.sealer.open(&key.seal_name(bench.account), &key.sealed)?,
        };
        let default = flag(&fields, "default_config")?.unwrap_or(key.default);
        // Sealed to its alias, so a new one means sealing anew.
        if let Some(record) = book.keys.iter_mut().find(|other| other.id == wanted) {
            record.alias.clone_from(&alias);
        }
        let at = put(book, bench, &gateway, &key.provider, &alias, default, &secret)?;
        if fresh.is_none() {
            // The same secret as before.
            book.keys[at].secret_id = key.secret_id;
        }
        limits(&mut book.keys[at], &fields)?;
        Ok(show(&book.keys[at]))
    });
    changed.await.map(Answer::Result)
}

async fn delete(call: &Call<'_>, gateway: &str, text_id: &str) -> Result<Answer> {
    let (wanted, gateway, text_id) = (id("provider config", text_id)?, gateway.to_owned(), text_id.to_owned());
    let gone = call.registry.change(call.account, move |book, bench| {
        let at = book.keys.iter().position(|key| key.id == wanted && key.gateway == gateway);
        let key = book.keys.remove(at.ok_or_else(|| not_found("provider config", &text_id))?);
        info!(account = bench.account, gateway, provider = key.provider, alias = key.alias, "stored key deleted");
        Ok(show(&key))
    });
    gone.await.map(Answer::Result)
}

/// Stores a secret under a name, whether there is one or not; says where it is among the book's keys.
///
/// # Errors
/// `BadInput` when a name is none or there are too many, and what sealing says.
pub(in crate::registry) fn put(
    book: &mut Book,
    bench: &Bench,
    gateway: &str,
    provider: &str,
    alias: &str,
    default: bool,
    secret: &Secret<String>,
) -> Result<usize> {
    if !is_slug(alias) {
        return Err(wrong(
            "alias",
            &Value::from(alias),
            "must be 1 to 64 letters, digits, - and _, not beginning with -",
        ));
    }
    let provider = known(provider)?;
    let open = secret.expose();
    if open.is_empty() || open.len() > MOST_SECRET || open.chars().any(char::is_control) {
        let message = format!("'secret' must be a text of 1 to {MOST_SECRET} bytes on one line");
        return Err(Error::bad_field("secret", message));
    }
    let sealed = bench.sealer.seal(&key_name(bench.account, gateway, provider, alias), open)?;
    let at = book.keys.iter().position(|key| key.is(gateway, provider) && key.alias == alias);
    if at.is_none() && book.keys.len() >= MOST {
        return Err(Error::bad_input(format!("an account has at most {MOST} stored keys: delete one first")));
    }
    if default {
        book.keys.iter_mut().filter(|key| key.is(gateway, provider)).for_each(|key| key.default = false);
    }
    let before = at.map(|at| book.keys[at].clone());
    let record = KeyRecord {
        id: before.as_ref().map_or_else(Uuid::new_v4, |before| before.id),
        gateway: gateway.to_owned(),
        provider: provider.to_owned(),
        alias: alias.to_owned(),
        default,
        secret_id: Uuid::new_v4(),
        sealed,
        preview: preview(open),
        rate_limit: before.as_ref().and_then(|before| before.rate_limit),
        rate_limit_period: before.as_ref().and_then(|before| before.rate_limit_period),
        created: before.as_ref().map_or(bench.now, |before| before.created),
        modified: bench.now,
    };
    info!(account = bench.account, gateway, provider, alias, "key stored");
    match at {
        Some(at) => {
            book.keys[at] = record;
            Ok(at)
        }
        None => {
            book.keys.push(record);
            Ok(book.keys.len() - 1)
        }
    }
}

/// A provider that a key can be for.
fn known(slug: &str) -> Result<&str> {
    let canonical = canonical(slug);
    let custom = canonical.strip_prefix(CUSTOM).is_some_and(is_slug);
    if !custom && !PROVIDERS.contains(&canonical) {
        let remedy = format!("must be the slug of a provider, or {CUSTOM} and that of a custom one");
        return Err(wrong("provider_slug", &Value::from(slug), remedy));
    }
    Ok(canonical)
}

/// The secret that is sent, or that a `secret_id` of the same account names. What is JSON is stored on one line.
fn secret(fields: &Map<String, Value>, book: &Book, bench: &Bench) -> Result<Option<Secret<String>>> {
    let refused = |words: &str| Error::bad_field("secret", format!("'secret' {words}"));
    match fields.get("secret") {
        None | Some(Value::Null) => {}
        Some(Value::String(text)) => {
            let text = match serde_json::from_str::<Map<String, Value>>(text) {
                Ok(object) => Value::Object(object).to_string(),
                Err(_) => text.trim().to_owned(),
            };
            return Ok(Some(Secret::new(text)));
        }
        Some(Value::Object(object)) => return Ok(Some(Secret::new(Value::Object(object.clone()).to_string()))),
        Some(_) => return Err(refused("must be a text")),
    }
    let Some(text) = text(fields, "secret_id", 1..=64)? else { return Ok(None) };
    let known = Uuid::try_parse(text).ok().and_then(|id| book.keys.iter().find(|key| key.secret_id == id));
    let key = known.ok_or_else(|| {
        Error::bad_field("secret_id", "'secret_id' names no secret of this account: send the secret itself as 'secret'")
    })?;
    bench.sealer.open(&key.seal_name(bench.account), &key.sealed).map(Some)
}

fn limits(key: &mut KeyRecord, fields: &Map<String, Value>) -> Result<()> {
    for (name, place) in [("rate_limit", &mut key.rate_limit), ("rate_limit_period", &mut key.rate_limit_period)] {
        match fields.get(name) {
            None => {}
            Some(Value::Null) => *place = None,
            Some(value) => {
                let number = value.as_f64().filter(|number| number.is_finite() && *number > 0.0);
                *place = Some(number.ok_or_else(|| wrong(name, value, "must be a number above 0"))?);
            }
        }
    }
    Ok(())
}

/// Enough of a secret to tell which one it is.
fn preview(secret: &str) -> String {
    let letters: Vec<char> = secret.chars().collect();
    match letters.len() {
        length if length >= SHOWN && !secret.starts_with('{') => {
            format!("***{}", letters[length - 4..].iter().collect::<String>())
        }
        _ => "***".to_owned(),
    }
}

fn show(key: &KeyRecord) -> Value {
    let mut shown = json!({
        "id": key.id.to_string(),
        "alias": key.alias,
        "provider_slug": key.provider,
        "gateway_id": key.gateway,
        "default_config": key.default,
        "secret_id": key.secret_id.to_string(),
        "secret_preview": key.preview,
        "created_at": moment(key.created),
        "modified_at": moment(key.modified),
    });
    for (name, number) in [("rate_limit", key.rate_limit), ("rate_limit_period", key.rate_limit_period)] {
        if let Some(number) = number {
            shown[name] = number.into();
        }
    }
    shown
}
