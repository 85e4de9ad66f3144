//! Cloudflare's own surface: `POST /client/v4/accounts/{account}/ai/run/{model}` with an envelope around the result. The AI
//! binding asks and is answered the same way, bare.

use actix_web::HttpResponse;

use crate::base::{Error, Result};
use crate::config::ResultShape;
use crate::http::ask::Ask;
use crate::http::batch;
use crate::http::chat::{self, ChatStream};
use crate::http::classic::{ClassicResult, NativeStream, TASKS, parse, wrap};
use crate::http::fields::Fields;
use crate::http::{Services, encode, stream, text};
use crate::task::Task;

/// Most cost-attribution tags, and their longest.
const MAX_TAGS: usize = 5;
const MAX_TAG: usize = 50;

/// Runs the model named in the path.
pub(super) async fn run(services: &Services, ask: &Ask, model: &str) -> Result<HttpResponse> {
    let queue = ask.query.get("queueRequest").is_some_and(|value| value == "true");
    check_tags(ask.query.get("tags").map(String::as_str))?;
    let fields = ask.fields()?;
    let busy = text::reject_if_busy(&fields)?;
    infer(services, ask, model, &fields, busy, queue).await
}

/// Runs the model named in the body: `{"model", "input"}`.
pub(super) async fn run_unified(services: &Services, ask: &Ask) -> Result<HttpResponse> {
    let fields = ask.fields()?;
    let model = fields.required_text("model")?;
    let Some(input) = fields.object("input")? else { return Err(fields.missing("input")) };
    let busy = text::reject_if_busy(&fields)? || text::reject_if_busy(&input)?;
    infer(services, ask, model, &input, busy, false).await
}

/// Runs a model on inputs from wherever, and wraps the result as the surface wants it.
pub(super) async fn infer(
    services: &Services,
    ask: &Ask,
    model: &str,
    inputs: &Fields<'_>,
    reject_if_busy: bool,
    queue: bool,
) -> Result<HttpResponse> {
    if inputs.has("request_id") {
        return batch::poll(services, ask, inputs).await;
    }
    let entry = ask.model_for(services, model, &TASKS)?;
    if queue || inputs.has("requests") {
        return batch::run(services, ask, &entry, inputs, reject_if_busy, queue).await;
    }
    if entry.task != Task::TextGeneration {
        return encode::infer(services, ask, &entry, inputs, reject_if_busy).await;
    }
    let request = parse(inputs, &entry)?;
    let choices = request.input.choices;
    let json = request.input.grammar.as_ref().is_some_and(|grammar| grammar.is_json());
    let delivery = ask.serve(services, &entry, request.input, reject_if_busy).await?;
    if request.stream {
        return Ok(match entry.shape {
            ResultShape::Classic => stream::response(vec![delivery], choices, NativeStream::new(ask.id)),
            ResultShape::Chat => {
                let shape = chat::Shape::new(ask.id, &entry);
                let render = ChatStream::native(shape, ask.surface, choices, ask.id);
                stream::response(vec![delivery], choices, render)
            }
        });
    }
    let answer = delivery.collect().await?;
    match entry.shape {
        ResultShape::Classic => wrap(ask.surface, &ClassicResult::new(&answer, &entry, json)?, answer.neurons),
        ResultShape::Chat => {
            let shape = chat::Shape::new(ask.id, &entry);
            wrap(ask.surface, &shape.completion(&answer), answer.neurons)
        }
    }
}

/// `tags=a,b`, checked and then dropped: nothing here attributes costs by tag yet.
fn check_tags(tags: Option<&str>) -> Result<()> {
    let Some(tags) = tags.filter(|tags| !tags.is_empty()) else { return Ok(()) };
    let good = |tag: &str| {
        let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, ':' | '-' | '.' | '/' | '@');
        !tag.is_empty() && tag.len() <= MAX_TAG && tag.chars().all(known)
    };
    if tags.split(',').count() <= MAX_TAGS && tags.split(',').all(good) {
        return Ok(());
    }
    let message = "'tags' takes at most 5 tags of at most 50 letters, digits and : - . / @, with commas between them";
    Err(Error::bad_field("tags", message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_checked() {
        for good in ["", "a", "team:x,env/prod,a@b.c", "1,2,3,4,5"] {
            assert!(check_tags(Some(good)).is_ok(), "{good}");
        }
        for bad in ["a,,b", "1,2,3,4,5,6", "ä", &"x".repeat(51)] {
            assert!(check_tags(Some(bad)).is_err(), "{bad}");
        }
    }
}
