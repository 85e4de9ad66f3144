//! The management API of gateways: a request to path and values, what the registry says to a response.

use actix_web::http::{Method, StatusCode};
use actix_web::{HttpRequest, HttpResponse, web};

use crate::base::{Error, Kind, Result};
use crate::http::{Services, ask, records};
use crate::registry::{self, Reply};
use crate::vault::Caller;

pub(super) async fn serve(
    services: &Services,
    request: &HttpRequest,
    payload: web::Payload,
    caller: &Caller,
    path: &[String],
) -> Result<HttpResponse> {
    if !caller.scopes.admin {
        return Err(Error::new(Kind::Forbidden, "This token may not manage gateways: its scopes lack `admin`."));
    }
    let method = match *request.method() {
        Method::GET | Method::HEAD => registry::Method::Get,
        Method::POST => registry::Method::Post,
        Method::PUT => registry::Method::Put,
        Method::PATCH => registry::Method::Patch,
        Method::DELETE => registry::Method::Delete,
        _ => registry::Method::Other,
    };
    let query = web::Query::<Vec<(String, String)>>::from_query(request.query_string())
        .map_err(|_| Error::bad_input("the query string does not parse"))?;
    let (limit, patience) = services.body_bounds();
    let body = ask::read_bytes(request.headers(), payload, limit, patience).await?;
    let body = if body.is_empty() { None } else { Some(ask::plain_json(request.headers(), body).await?) };
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    let told =
        records::serve(services, &caller.account, request.method(), &path, request.query_string(), body.as_ref());
    if let Some(answer) = Box::pin(told).await {
        return answer;
    }
    let is_evaluation = method == registry::Method::Post && matches!(path[..], ["gateways", _, "evaluations"]);
    if is_evaluation {
        records::kept(&services.relays.logs)?;
    }
    // Addresses in answers are those that the caller used.
    let base = {
        let connection = request.connection_info();
        format!("{}://{}", connection.scheme(), connection.host())
    };
    let Reply { status, body } =
        services.relays.registry.serve(&caller.account, method, &path, &query, body, &base).await;
    if is_evaluation {
        services.evaluations.wake();
    }
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    Ok(HttpResponse::build(status).content_type("application/json").body(body.to_string()))
}
