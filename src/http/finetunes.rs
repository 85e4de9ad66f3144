//! Adapters that an account brings: `POST, GET …/ai/finetunes`, `GET …/finetunes/public`, `POST …/finetunes/{id or name}/finetune-assets`,
//! and `DELETE …/finetunes/{id or name}`, which is ours.
//!
//!     create {"model","name","description"} ──> two uploads, multipart `file_name` + `file` ──> requests name it in `lora`

use std::time::{Duration, Instant};

use actix_multipart::{Field, Multipart, MultipartError};
use actix_web::error::PayloadError;
use actix_web::http::StatusCode;
use actix_web::http::header::HeaderMap;
use actix_web::{HttpResponse, web};
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::adapters::{Draft, Finetune, Upload};
use crate::base::{AccountId, Error, Kind, Millis, Result};
use crate::http::ask::Ask;
use crate::http::native::Envelope;
use crate::http::{Services, answer, text};

/// Longest `file_name` looked at.
const MAX_FILE_NAME: usize = 256;

/// Makes an adapter known.
pub(super) async fn create(services: &Services, ask: &Ask) -> Result<HttpResponse> {
    let fields = ask.fields()?;
    let entry = ask.text_model(services, fields.required_text("model")?)?;
    text::takes_adapters(&entry)?;
    let draft = Draft {
        name: fields.required_text("name")?.to_owned(),
        model: entry.id.clone(),
        description: fields.text("description")?.unwrap_or_default().to_owned(),
    };
    let finetune = services.gateway.adapters.create(&ask.caller.account, draft).await?;
    done(services, &finetune)
}

/// The account's adapters, oldest first.
pub(super) async fn list(services: &Services, account: &AccountId) -> Result<HttpResponse> {
    let own = services.gateway.adapters.list(account).await?;
    let own: Vec<Value> = own.iter().map(|finetune| shown(services, finetune)).collect();
    answer::json(StatusCode::OK, &Envelope::new(&own))
}

/// Adapters that every account may use.
pub(super) async fn public(services: &Services) -> Result<HttpResponse> {
    match &services.config.get().lora.public_account {
        Some(account) => list(services, account).await,
        None => answer::json(StatusCode::OK, &Envelope::new(&[(); 0])),
    }
}

/// Takes an adapter away.
pub(super) async fn delete(services: &Services, ask: &Ask, key: &str) -> Result<HttpResponse> {
    let finetune = services.gateway.adapters.delete(&ask.caller.account, key).await?;
    done(services, &finetune)
}

fn done(services: &Services, finetune: &Finetune) -> Result<HttpResponse> {
    answer::json(StatusCode::OK, &Envelope::new(&shown(services, finetune)))
}

fn shown(services: &Services, finetune: &Finetune) -> Value {
    json!({
        "id": finetune.id,
        "name": finetune.name,
        "model": finetune.model,
        "description": finetune.description,
        "created_at": moment(finetune.created),
        "modified_at": moment(finetune.modified),
        "public": services.config.get().lora.public_account.as_ref() == Some(&finetune.account),
        // Not Cloudflare's: whether both files are there.
        "ready": finetune.complete().is_ok(),
    })
}

/// `2026-11-24 15:04:05.678`, as the API in front of Cloudflare's models writes times.
fn moment(at: Millis) -> String {
    let at = i64::try_from(at.0).ok().and_then(|at| jiff::Timestamp::from_millisecond(at).ok()).unwrap_or_default();
    at.strftime("%Y-%m-%d %H:%M:%S%.3f").to_string()
}

/// Takes in one file of an adapter, straight to disk.
///
/// # Errors
/// `BadInput` for a form without `file` or with something else, `TooLarge`, `Timeout` when bytes stop coming; nothing of a
/// file is kept then.
pub(super) async fn upload(
    services: &Services,
    account: &AccountId,
    key: &str,
    headers: &HeaderMap,
    payload: web::Payload,
) -> Result<HttpResponse> {
    let server = services.config.get().server.clone();
    let mut form = Form {
        parts: Multipart::new(headers, payload),
        patience: server.read_timeout,
        deadline: Instant::now() + server.request_timeout,
    };
    let mut named: Option<String> = None;
    let mut upload: Option<(Upload, Option<String>)> = None;
    while let Some(mut part) = form.next().await? {
        match part.name() {
            Some("file_name") => {
                let mut text = Vec::new();
                while let Some(bytes) = form.bytes(&mut part).await? {
                    text.extend_from_slice(&bytes);
                    if text.len() > MAX_FILE_NAME {
                        return Err(Error::bad_field(
                            "file_name",
                            format!("'file_name' is longer than {MAX_FILE_NAME} bytes"),
                        ));
                    }
                }
                named = Some(String::from_utf8_lossy(&text).trim().to_owned());
            }
            Some("file") if upload.is_none() => {
                let filename = part.content_disposition().and_then(|about| about.get_filename()).map(str::to_owned);
                let mut file = services.gateway.adapters.upload(account, key).await?;
                while let Some(bytes) = form.bytes(&mut part).await? {
                    file.write(&bytes).await?;
                }
                upload = Some((file, filename));
            }
            other => {
                let name: String = other.unwrap_or("").chars().take(MAX_FILE_NAME).collect();
                return Err(Error::bad_input(format!(
                    "the form has a part {name:?} too many: send `file_name` and one `file`"
                )));
            }
        }
    }
    let Some((upload, filename)) = upload else { return Err(Error::bad_field("file", "'file' is required")) };
    let Some(name) = named.or(filename) else { return Err(Error::bad_field("file_name", "'file_name' is required")) };
    let finetune = services.gateway.adapters.keep(upload, &name).await?;
    let mut shown = shown(services, &finetune);
    shown["file_name"] = json!(name);
    answer::json(StatusCode::OK, &Envelope::new(&shown))
}

/// A form as it comes in: each piece within the patience for one, all within the deadline.
struct Form {
    parts: Multipart,
    patience: Duration,
    deadline: Instant,
}

impl Form {
    async fn next(&mut self) -> Result<Option<Field>> {
        let limit = self.limit();
        timeout(limit, self.parts.next()).await.map_err(|_| late())?.transpose().map_err(broken)
    }

    async fn bytes(&self, part: &mut Field) -> Result<Option<web::Bytes>> {
        timeout(self.limit(), part.next()).await.map_err(|_| late())?.transpose().map_err(broken)
    }

    fn limit(&self) -> Duration {
        self.patience.min(self.deadline.saturating_duration_since(Instant::now()))
    }
}

fn late() -> Error {
    Error::new(Kind::Timeout, "The file did not come in time.")
}

fn broken(error: MultipartError) -> Error {
    match error {
        MultipartError::Payload(PayloadError::Overflow) => Error::new(Kind::TooLarge, "The form is too large."),
        MultipartError::ContentTypeMissing
        | MultipartError::ContentTypeIncompatible
        | MultipartError::BoundaryMissing => {
            Error::bad_input("send a form: Content-Type multipart/form-data with `file_name` and `file`")
        }
        other => {
            let message = format!("the form does not parse, or broke off before its end ({other})");
            Error::bad_input(message).with_source(std::io::Error::other(other.to_string()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_written_as_the_api_writes_them() {
        assert_eq!(moment(Millis(1_711_968_245_078)), "2024-04-01 10:44:05.078");
        assert_eq!(moment(Millis(0)), "1970-01-01 00:00:00.000");
        assert_eq!(moment(Millis(u64::MAX)), "1970-01-01 00:00:00.000");
    }
}
