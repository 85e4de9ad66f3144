//! A model hub in Hugging Face's URL layout, with the faults of real ones: cut connections, redirects to storage, wrong
//! bytes, busy spells, gates.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use actix_web::web::{Bytes, Data, Path, Query, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{Serving, serve};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What goes wrong, how often. Counts run down as they are used.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Answers that are cut after so many bytes.
    pub cut_after: Vec<usize>,
    /// Answers with 503.
    pub busy: usize,
    /// Answers whose bytes are not the file's.
    pub wrong: usize,
    /// Ranges are ignored: everything comes again.
    pub ignore_range: bool,
    /// The listing says names only.
    pub names_only: bool,
    /// A token is needed, and its account must have been let in.
    pub gated: bool,
    /// Says that there is more to come than there is, with no end of it.
    pub never_whole: bool,
}

pub struct Hub {
    serving: Serving,
    state: Data<State>,
}

struct State {
    files: HashMap<String, Vec<u8>>,
    order: Vec<String>,
    faults: Arc<Mutex<Faults>>,
    /// `path offset` of every download.
    asked: Arc<Mutex<Vec<(String, u64)>>>,
}

impl Hub {
    pub fn start(files: &[(&str, Vec<u8>)], faults: Faults) -> Self {
        let state = Data::new(State {
            files: files.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.clone())).collect(),
            order: files.iter().map(|(name, _)| (*name).to_owned()).collect(),
            faults: Arc::new(Mutex::new(faults)),
            asked: Arc::default(),
        });
        let shared = state.clone();
        let serving = serve(move |config: &mut ServiceConfig| {
            config
                .app_data(shared.clone())
                .route("/api/models/{org}/{name}/revision/{revision}", web::get().to(listing))
                .route("/{org}/{name}/resolve/{revision}/{file:.*}", web::get().to(resolve))
                .route("/{org}/{name}/resolve/{revision}/{file:.*}", web::head().to(resolve))
                .route("/storage/{file:.*}", web::get().to(storage));
        });
        Self { serving, state }
    }

    pub fn url(&self) -> String {
        self.serving.url()
    }

    pub fn set(&self, faults: Faults) {
        *self.state.faults.lock().expect("not poisoned") = faults;
    }

    /// Offsets at which downloads of this file began.
    pub fn offsets(&self, file: &str) -> Vec<u64> {
        let asked = self.state.asked.lock().expect("not poisoned");
        asked.iter().filter(|(name, _)| name == file).map(|(_, offset)| *offset).collect()
    }
}

pub fn sha256(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

fn is_large(bytes: &[u8]) -> bool {
    bytes.len() > 1000
}

fn gate(state: &State, request: &HttpRequest) -> Option<HttpResponse> {
    if !state.faults.lock().expect("not poisoned").gated {
        return None;
    }
    let token = request.headers().get("authorization").and_then(|value| value.to_str().ok());
    match token {
        Some("Bearer let-in") => None,
        Some(_) => Some(HttpResponse::Forbidden().insert_header(("X-Error-Code", "GatedRepo")).finish()),
        None => Some(HttpResponse::Unauthorized().insert_header(("X-Error-Code", "GatedRepo")).finish()),
    }
}

async fn listing(
    state: Data<State>,
    request: HttpRequest,
    path: Path<(String, String, String)>,
    query: Query<HashMap<String, String>>,
) -> HttpResponse {
    let (org, name, revision) = path.into_inner();
    if (org.as_str(), name.as_str()) != ("org", "model") {
        return HttpResponse::Unauthorized().insert_header(("X-Error-Code", "RepoNotFound")).finish();
    }
    if !matches!(revision.as_str(), "main" | "refs/pr/1") {
        return HttpResponse::NotFound().insert_header(("X-Error-Code", "RevisionNotFound")).finish();
    }
    if let Some(refusal) = gate(&state, &request) {
        return refusal;
    }
    let names_only = state.faults.lock().expect("not poisoned").names_only || !query.contains_key("blobs");
    let siblings: Vec<Value> = state
        .order
        .iter()
        .map(|name| {
            let bytes = &state.files[name];
            match (names_only, is_large(bytes)) {
                (true, _) => json!({"rfilename": name}),
                (false, true) => json!({"rfilename": name, "size": bytes.len(), "blobId": "b".repeat(40),
                    "lfs": {"sha256": sha256(bytes), "size": bytes.len(), "pointerSize": 134}}),
                (false, false) => json!({"rfilename": name, "size": bytes.len(), "blobId": "b".repeat(40)}),
            }
        })
        .collect();
    HttpResponse::Ok().json(json!({"id": "org/model", "sha": COMMIT, "private": false, "siblings": siblings}))
}

async fn resolve(
    state: Data<State>,
    request: HttpRequest,
    path: Path<(String, String, String, String)>,
) -> HttpResponse {
    let (_, _, revision, file) = path.into_inner();
    assert_eq!(revision, COMMIT, "files must be asked for at the commit that was listed");
    if let Some(refusal) = gate(&state, &request) {
        return refusal;
    }
    let Some(bytes) = state.files.get(&file) else {
        return HttpResponse::NotFound().insert_header(("X-Error-Code", "EntryNotFound")).finish();
    };
    if !is_large(bytes) {
        return send(&state, &request, &file, bytes);
    }
    HttpResponse::Found()
        .insert_header(("Location", format!("/storage/{file}?signature=x")))
        .insert_header(("X-Repo-Commit", COMMIT))
        .insert_header(("X-Linked-Size", bytes.len().to_string()))
        .insert_header(("X-Linked-Etag", format!("\"{}\"", sha256(bytes))))
        .finish()
}

async fn storage(state: Data<State>, request: HttpRequest, file: Path<String>) -> HttpResponse {
    let bytes = &state.files[&*file];
    send(&state, &request, &file, bytes)
}

fn send(state: &State, request: &HttpRequest, file: &str, bytes: &[u8]) -> HttpResponse {
    if request.method() == actix_web::http::Method::HEAD {
        return HttpResponse::Ok().insert_header(("ETag", format!("\"{}\"", "c".repeat(40)))).body(bytes.to_vec());
    }
    let range = request.headers().get("range").and_then(|range| range.to_str().ok());
    let start = range.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    let mut faults = state.faults.lock().expect("not poisoned");
    state.asked.lock().expect("not poisoned").push((file.to_owned(), start.unwrap_or(0) as u64));
    if faults.busy > 0 {
        faults.busy -= 1;
        return HttpResponse::ServiceUnavailable().finish();
    }
    let start = start.filter(|_| !faults.ignore_range);
    if start.is_some_and(|start| start >= bytes.len()) {
        return HttpResponse::RangeNotSatisfiable().finish();
    }
    let mut content = bytes[start.unwrap_or(0)..].to_vec();
    if faults.wrong > 0 && is_large(bytes) {
        faults.wrong -= 1;
        content[0] ^= 1;
    }
    let cut = if is_large(bytes) && !faults.cut_after.is_empty() { Some(faults.cut_after.remove(0)) } else { None };
    let cut = cut.or(faults.never_whole.then_some(0));
    let mut response = match start {
        Some(_) => HttpResponse::PartialContent(),
        None => HttpResponse::Ok(),
    };
    if let Some(start) = start {
        let range = format!("bytes {start}-{}/{}", bytes.len() - 1, bytes.len());
        response.insert_header(("Content-Range", range));
    }
    match cut {
        None => response.body(content),
        Some(after) => {
            content.truncate(after);
            let stream = [Ok(Bytes::from(content)), Err(std::io::Error::other("cut"))];
            response.streaming(futures_util::stream::iter(stream))
        }
    }
}
