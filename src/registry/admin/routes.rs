//! Dynamic routes, their versions and deployments. Four answers have no envelope: list, patch, and the lists of versions and deployments;
//! the official clients read them as they stand.

use serde_json::{Map, Value, json};
use tracing::info;
use uuid::Uuid;

use super::super::book::{Book, DeploymentRecord, RouteRecord, VersionRecord};
use super::super::edit::Bench;
use super::{Answer, Call, Method, id, missing, moment, not_found, text, wrong};
use crate::base::{AccountId, Error, Result};
use crate::route::Graph;

/// Routes of one gateway, and versions and deployments of one route.
const MOST: usize = 500;
const MOST_VERSIONS: usize = 1000;
/// Bytes of a version's elements.
const MOST_ELEMENTS: usize = 256 << 10;

pub(super) async fn serve(mut call: Call<'_>, method: Method, gateway: &str, path: &[&str]) -> Result<Answer> {
    match (path, method) {
        ([], Method::Get) => list(&call, gateway),
        ([], Method::Post) => {
            let fields = call.fields()?;
            create(&call, gateway, fields).await
        }
        ([route], Method::Get) => get(&call, gateway, route),
        ([route], Method::Patch | Method::Put) => {
            let fields = call.fields()?;
            rename(&call, gateway, route, fields).await
        }
        ([route], Method::Delete) => delete(&call, gateway, route).await,
        ([route, "versions"], Method::Get) => list_versions(&call, gateway, route),
        ([route, "versions"], Method::Post) => {
            let fields = call.fields()?;
            create_version(&call, gateway, route, fields).await
        }
        ([route, "versions", version], Method::Get) => get_version(&call, gateway, route, version),
        ([route, "deployments"], Method::Get) => list_deployments(&call, gateway, route),
        ([route, "deployments"], Method::Post) => {
            let fields = call.fields()?;
            deploy(&call, gateway, route, fields).await
        }
        ([] | [_] | [_, "versions" | "deployments"] | [_, "versions", _], _) => Ok(Answer::NoMethod),
        _ => Ok(Answer::NoPath),
    }
}

fn list(call: &Call, gateway: &str) -> Result<Answer> {
    let view = call.registry.view();
    let routes = view.book(call.account.as_str()).into_iter().flat_map(|book| book.routes(gateway));
    let routes: Vec<_> = routes.filter(|route| call.finds(&[&route.name])).collect();
    lines(call, "routes", routes, |route| show(call.account, route))
}

fn get(call: &Call, gateway: &str, text: &str) -> Result<Answer> {
    with(call, gateway, text, |route| Ok(Answer::Result(show(call.account, route))))
}

async fn create(call: &Call<'_>, gateway: &str, fields: Map<String, Value>) -> Result<Answer> {
    let gateway = gateway.to_owned();
    let made = call.registry.change(call.account, move |book, bench| {
        let name = name(&fields)?.ok_or_else(|| missing("name"))?;
        must_be_alone(book, &gateway, &name, None)?;
        if book.routes(&gateway).count() >= MOST {
            return Err(Error::bad_input(format!("a gateway has at most {MOST} routes: delete one first")));
        }
        let version = version(&fields, bench)?;
        // The first version is put in force at once, so it must work.
        Graph::parse(&version.elements).map_err(|error| error.with_param("elements"))?;
        let first = DeploymentRecord {
            id: Uuid::new_v4(),
            version: version.id,
            comment: version.comment.clone(),
            created: bench.now,
        };
        let route = RouteRecord {
            id: Uuid::new_v4(),
            gateway,
            name,
            versions: vec![version],
            deployments: vec![first],
            created: bench.now,
            modified: bench.now,
        };
        info!(account = bench.account, gateway = route.gateway, route = route.name, "route made");
        let shown = show(&AccountId::new(bench.account), &route);
        book.routes.push(route);
        Ok(shown)
    });
    made.await.map(Answer::Result)
}

async fn rename(call: &Call<'_>, gateway: &str, text: &str, fields: Map<String, Value>) -> Result<Answer> {
    let changed = change(call, gateway, text, move |book, at, bench| {
        let name = name(&fields)?.ok_or_else(|| missing("name"))?;
        let gateway = book.routes[at].gateway.clone();
        must_be_alone(book, &gateway, &name, Some(book.routes[at].id))?;
        book.routes[at].name = name;
        book.routes[at].modified = bench.now;
        Ok(show(&AccountId::new(bench.account), &book.routes[at]))
    });
    Ok(Answer::Bare(json!({ "success": true, "route": changed.await? })))
}

async fn delete(call: &Call<'_>, gateway: &str, text: &str) -> Result<Answer> {
    let gone = change(call, gateway, text, |book, at, bench| {
        let route = book.routes.remove(at);
        info!(account = bench.account, gateway = route.gateway, route = route.name, "route deleted");
        Ok(show(&AccountId::new(bench.account), &route))
    });
    gone.await.map(Answer::Result)
}

fn list_versions(call: &Call, gateway: &str, text: &str) -> Result<Answer> {
    with(call, gateway, text, |route| {
        lines(call, "versions", route.versions.iter().collect(), |version| show_version(route, version))
    })
}

async fn create_version(call: &Call<'_>, gateway: &str, text: &str, fields: Map<String, Value>) -> Result<Answer> {
    let made = change(call, gateway, text, move |book, at, bench| {
        let version = version(&fields, bench)?;
        let route = &mut book.routes[at];
        if route.versions.len() >= MOST_VERSIONS {
            // The one in force and the newest ones are what anybody goes back to.
            let deployed = route.deployments.last().map(|deployment| deployment.version);
            let oldest = route.versions.iter().position(|version| Some(version.id) != deployed);
            let gone = oldest.map(|oldest| route.versions.remove(oldest).id);
            route.deployments.retain(|deployment| Some(deployment.version) != gone);
        }
        route.modified = bench.now;
        let mut shown = head(&AccountId::new(bench.account), route, &version.elements);
        shown["version_id"] = version.id.to_string().into();
        shown["version"] = show_version(route, &version);
        route.versions.push(version);
        Ok(shown)
    });
    made.await.map(Answer::Result)
}

fn get_version(call: &Call, gateway: &str, text: &str, version: &str) -> Result<Answer> {
    with(call, gateway, text, |route| {
        let found = route.version(id("version", version)?).ok_or_else(|| not_found("version", version))?;
        let mut shown = head(call.account, route, &found.elements);
        if let (Some(shown), Value::Object(more)) = (shown.as_object_mut(), show_version(route, found)) {
            shown.extend(more);
        }
        Ok(Answer::Result(shown))
    })
}

fn list_deployments(call: &Call, gateway: &str, text: &str) -> Result<Answer> {
    with(call, gateway, text, |route| lines(call, "deployments", route.deployments.iter().collect(), show_deployment))
}

async fn deploy(call: &Call<'_>, gateway: &str, text_id: &str, fields: Map<String, Value>) -> Result<Answer> {
    let made = change(call, gateway, text_id, move |book, at, bench| {
        let wanted = text(&fields, "version_id", 1..=64)?.ok_or_else(|| missing("version_id"))?;
        let comment = text(&fields, "comment", 0..=1024)?.map(str::to_owned);
        let route = &mut book.routes[at];
        let version = route.version(id("version", wanted)?).ok_or_else(|| not_found("version", wanted))?;
        if let Err(error) = Graph::parse(&version.elements) {
            return Err(Error::bad_field("version_id", format!("version {wanted} is not valid: {}", error.message())));
        }
        let deployment = DeploymentRecord { id: Uuid::new_v4(), version: version.id, comment, created: bench.now };
        if route.deployments.len() >= MOST_VERSIONS {
            route.deployments.remove(0);
        }
        info!(account = bench.account, gateway = route.gateway, route = route.name, version = wanted, "route deployed");
        route.deployments.push(deployment);
        route.modified = bench.now;
        Ok(show(&AccountId::new(bench.account), route))
    });
    made.await.map(Answer::Result)
}

/// Changes the route that the path names.
async fn change(
    call: &Call<'_>,
    gateway: &str,
    text: &str,
    edit: impl FnOnce(&mut Book, usize, &Bench) -> Result<Value> + Send + 'static,
) -> Result<Value> {
    let (wanted, gateway, text) = (id("route", text)?, gateway.to_owned(), text.to_owned());
    let changed = call.registry.change(call.account, move |book, bench| {
        let at = book.routes.iter().position(|route| route.id == wanted && route.gateway == gateway);
        edit(book, at.ok_or_else(|| not_found("route", &text))?, bench)
    });
    changed.await
}

/// Reads the route that the path names.
fn with(call: &Call, gateway: &str, text: &str, read: impl FnOnce(&RouteRecord) -> Result<Answer>) -> Result<Answer> {
    let (view, wanted) = (call.registry.view(), id("route", text)?);
    let route = view.book(call.account.as_str()).and_then(|book| book.routes(gateway).find(|route| route.id == wanted));
    read(route.ok_or_else(|| not_found("route", text))?)
}

/// A list without the envelope: newest first unless the query says `asc`.
fn lines<T>(call: &Call, name: &str, mut list: Vec<T>, show: impl Fn(T) -> Value) -> Result<Answer> {
    let mut page = call.page()?;
    let direction = match call.asked("order_by_direction") {
        Some("asc") => "asc",
        None | Some("desc") => {
            list.reverse();
            "desc"
        }
        Some(other) => return Err(wrong("order_by_direction", &Value::from(other), "must be asc or desc")),
    };
    if let Some(other) = call.asked("order_by").filter(|key| *key != "created_at") {
        return Err(wrong("order_by", &Value::from(other), "must be created_at"));
    }
    let shown: Vec<_> = page.cut(list).into_iter().map(show).collect();
    let mut data = json!({
        "order_by": "created_at",
        "order_by_direction": direction,
        "page": page.page,
        "per_page": page.per_page,
    });
    data[name] = shown.into();
    Ok(Answer::Bare(json!({ "success": true, "data": data })))
}

/// What callers write behind `dynamic/`.
fn name(fields: &Map<String, Value>) -> Result<Option<String>> {
    let Some(name) = text(fields, "name", 1..=64)? else { return Ok(None) };
    if name.trim() != name || name.contains('/') || name.chars().any(char::is_control) {
        let remedy = "must have no / and no white space around it: callers write it as dynamic/NAME";
        return Err(wrong("name", &Value::from(name), remedy));
    }
    Ok(Some(name.to_owned()))
}

fn must_be_alone(book: &Book, gateway: &str, name: &str, own: Option<Uuid>) -> Result<()> {
    if book.routes(gateway).any(|route| route.name == name && Some(route.id) != own) {
        return Err(wrong("name", &Value::from(name), "must be one that no other route of this gateway has"));
    }
    Ok(())
}

/// A version of what was sent: a list of elements, whole or not yet.
fn version(fields: &Map<String, Value>, bench: &Bench) -> Result<VersionRecord> {
    let elements = fields.get("elements").filter(|elements| !elements.is_null()).ok_or_else(|| missing("elements"))?;
    let list = elements.as_array().ok_or_else(|| Error::bad_field("elements", "'elements' must be a list"))?;
    for (at, element) in list.iter().enumerate() {
        for key in ["id", "type"] {
            if !element[key].is_string() {
                let at = format!("elements.{at}.{key}");
                return Err(Error::bad_field(&at, format!("'{at}' must be a text")));
            }
        }
    }
    if elements.to_string().len() > MOST_ELEMENTS {
        return Err(Error::bad_field("elements", format!("'elements' must be at most {MOST_ELEMENTS} bytes of JSON")));
    }
    Ok(VersionRecord {
        id: Uuid::new_v4(),
        valid: Graph::parse(elements).is_ok(),
        elements: elements.clone(),
        comment: text(fields, "comment", 0..=1024)?.map(str::to_owned),
        created: bench.now,
    })
}

/// A route with the version that is in force.
fn show(account: &AccountId, route: &RouteRecord) -> Value {
    let deployed = route.deployed();
    let mut shown = head(account, route, deployed.map_or(&Value::Null, |version| &version.elements));
    if let (Some(version), Some(deployment)) = (deployed, route.deployments.last()) {
        shown["version"] = show_version(route, version);
        shown["deployment"] = show_deployment(deployment);
    }
    shown
}

fn head(account: &AccountId, route: &RouteRecord, elements: &Value) -> Value {
    json!({
        "id": route.id.to_string(),
        "name": route.name,
        "gateway_id": route.gateway,
        "account_tag": account.as_str(),
        "elements": elements,
        "created_at": moment(route.created),
        "modified_at": moment(route.modified),
    })
}

fn show_version(route: &RouteRecord, version: &VersionRecord) -> Value {
    let active = route.deployed().is_some_and(|deployed| deployed.id == version.id);
    let mut shown = json!({
        "version_id": version.id.to_string(),
        "data": version.elements.to_string(),
        "active": active.to_string(),
        "is_valid": version.valid,
        "created_at": moment(version.created),
    });
    if let Some(comment) = &version.comment {
        shown["comment"] = comment.as_str().into();
    }
    shown
}

fn show_deployment(deployment: &DeploymentRecord) -> Value {
    let mut shown = json!({
        "deployment_id": deployment.id.to_string(),
        "version_id": deployment.version.to_string(),
        "created_at": moment(deployment.created),
    });
    if let Some(comment) = &deployment.comment {
        shown["comment"] = comment.as_str().into();
    }
    shown
}
