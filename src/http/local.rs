//! The engine of this process as a provider among others: a gateway's call in, an ordinary answer out.

use std::cell::{Cell, OnceCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use actix_web::HttpResponse;
use actix_web::web;
use futures_util::FutureExt;

use crate::base::{Error, Kind, Result};
use crate::gateway::Terms;
use crate::gateway::asked::Who;
use crate::gateway::headers::Headers;
use crate::gateway::relay::{Local, LocalAnswer};
use crate::gateway::step::{LocalCall, LocalEndpoint};
use crate::http::ask::{self, Ask};
use crate::http::route::{Endpoint, Surface, openai};
use crate::http::{Services, answer, error};

/// The engine, for a relay.
pub(super) fn engine(services: Services) -> Local {
    Rc::new(move |call, who, gateway| {
        let services = services.clone();
        async move {
            let surface = match call.endpoint {
                LocalEndpoint::Run(_) => Surface::Native,
                LocalEndpoint::OpenAi(_) => Surface::OpenAi,
            };
            let id = who.id;
            let response = match serve(&services, surface, call, who, gateway).await {
                Ok(response) => response,
                Err(error) => error::response(surface, id, &error),
            };
            divided(response)
        }
        .boxed_local()
    })
}

async fn serve(
    services: &Services,
    surface: Surface,
    call: LocalCall,
    who: Who,
    gateway: Arc<str>,
) -> Result<HttpResponse> {
    let Some(caller) = who.engine else {
        return Err(Error::new(Kind::Unauthorized, "Authentication error"));
    };
    let endpoint = match call.endpoint {
        LocalEndpoint::Run(model) => Endpoint::Run(model),
        LocalEndpoint::OpenAi(path) => openai(&path)?,
    };
    let query = web::Query::<HashMap<String, String>>::from_query(&call.query)
        .map_err(|_| Error::bad_input("the query string does not parse"))?;
    let terms = Terms { budget: caller.budget, gateway: Some(gateway), tally: who.tally, ..Terms::default() };
    let ask = Ask {
        terms,
        id: who.id,
        surface,
        caller,
        affinity: call.affinity,
        received: who.received,
        query: query.into_inner(),
        model_header: None,
        body: ask::parse_json(call.body).await?,
        model: OnceCell::new(),
        served: Cell::new(false),
    };
    answer(services, &ask, &endpoint).await
}

fn divided(response: HttpResponse) -> LocalAnswer {
    let status = response.status();
    let headers = Headers::from(response.headers());
    LocalAnswer { status, headers, body: response.into_body() }
}
