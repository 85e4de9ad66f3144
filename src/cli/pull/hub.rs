//! A hub that speaks Hugging Face's URL layout.
//!
//!     GET  /api/models/{repo}/revision/{revision}?blobs=true   -> commit, files, sizes, SHA-256 of large files
//!     GET  /{repo}/resolve/{commit}/{file}                     -> bytes, mostly after a redirect; Range is honoured
//!     HEAD the same, redirects not followed                    -> X-Linked-Size, X-Linked-Etag, X-Repo-Commit
//!
//! Here a refusal becomes a sentence with a remedy, and it is decided whether trying again can help.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::header::{ETAG, HeaderMap, RANGE};
use reqwest::{Response, StatusCode, Url};
use serde::Deserialize;

use crate::base::{Error, Kind, Result, Secret};
use crate::cli::client::root_cause;
use crate::cli::failed;

/// Silence longer than this means the connection is dead.
const PATIENCE: Duration = Duration::from_secs(30);

/// A repository at a revision.
#[derive(Debug, Clone, PartialEq)]
pub struct Repo {
    /// Who published it.
    pub org: String,
    /// The model.
    pub name: String,
    /// Branch, tag or commit.
    pub revision: String,
}

/// A file of a repository, as far as the hub describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct RemoteFile {
    /// Path inside the repository.
    pub path: String,
    /// Bytes.
    pub size: Option<u64>,
    /// Lower-case hex.
    pub sha256: Option<String>,
}

/// A repository's content at one commit.
pub struct Listing {
    /// What the revision stood for when we asked; files are fetched at this commit, so that they belong together.
    pub commit: String,
    /// In the hub's order.
    pub files: Vec<RemoteFile>,
}

/// Whether the same request may succeed later.
pub enum Refusal {
    /// A busy or broken server or line: try again, not before this much time if it said so.
    Passing(String, Option<Duration>),
    /// The range asked for is not there: what we have is as long as the file, or longer.
    PastEnd,
    /// Trying again changes nothing.
    Final(Error),
}

/// A hub and our standing with it.
pub struct Hub {
    http: reqwest::Client,
    /// For HEAD: the interesting headers are on the redirect itself.
    unredirected: reqwest::Client,
    endpoint: String,
    token: Option<Secret<String>>,
}

impl Hub {
    /// A client for this hub.
    pub fn new(endpoint: &str, token: Option<Secret<String>>) -> Result<Self> {
        let is_url = Url::parse(endpoint).is_ok_and(|url| matches!(url.scheme(), "http" | "https"));
        if !is_url {
            return Err(Error::bad_input(format!(
                "--endpoint {endpoint:?} is no URL: give one such as https://huggingface.co"
            )));
        }
        let client = |redirects| {
            reqwest::Client::builder()
                .user_agent(concat!("neurond/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(Duration::from_secs(15))
                .read_timeout(PATIENCE)
                .redirect(redirects)
                .build()
                .map_err(|error| Error::internal(format!("cannot set up HTTP: {error}")))
        };
        Ok(Self {
            http: client(reqwest::redirect::Policy::limited(10))?,
            unredirected: client(reqwest::redirect::Policy::none())?,
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token,
        })
    }

    /// What the repository holds.
    pub async fn list(&self, repo: &Repo) -> Result<Listing> {
        #[derive(Deserialize)]
        struct Info {
            sha: Option<String>,
            #[serde(default)]
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
            size: Option<u64>,
            lfs: Option<Lfs>,
        }
        #[derive(Deserialize)]
        struct Lfs {
            size: Option<u64>,
            #[serde(alias = "oid")]
            sha256: Option<String>,
        }

        let url = format!(
            "{}/api/models/{}/{}/revision/{}?blobs=true",
            self.endpoint,
            repo.org,
            repo.name,
            encode(&repo.revision, SEGMENT)
        );
        let body = retrying(async || {
            let response = self.send(repo, self.authorised(self.http.get(&url))).await?;
            response.bytes().await.map_err(|error| Refusal::Passing(root_cause(&error), None))
        })
        .await?;
        let info: Info = serde_json::from_slice(&body).map_err(|error| {
            failed(format!("{} did not answer as a model hub does ({error}): is --endpoint right?", self.endpoint))
        })?;
        let files = info.siblings.into_iter().map(|sibling| {
            if !stays_inside(&sibling.rfilename) {
                return Err(failed(format!("{repo} lists {:?}, which leads out of its folder", sibling.rfilename)));
            }
            let (size, sha256) = sibling.lfs.map_or((None, None), |lfs| (lfs.size, lfs.sha256));
            Ok(RemoteFile {
                path: sibling.rfilename,
                size: size.or(sibling.size),
                sha256: sha256.and_then(|hash| sha256_hex(&hash)),
            })
        });
        Ok(Listing {
            commit: info.sha.filter(|sha| !sha.is_empty()).unwrap_or_else(|| repo.revision.clone()),
            files: files.collect::<Result<_>>()?,
        })
    }

    /// Asks for what the listing left out: some mirrors list names only.
    pub async fn complete(&self, repo: &Repo, commit: &str, mut files: Vec<RemoteFile>) -> Result<Vec<RemoteFile>> {
        for file in files.iter_mut().filter(|file| file.size.is_none()) {
            let url = self.file_url(repo, commit, &file.path);
            let headers = retrying(async || {
                let response = self.send(repo, self.authorised(self.unredirected.head(&url))).await?;
                Ok(response.headers().clone())
            })
            .await?;
            let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
            let length = text("x-linked-size").or_else(|| text("content-length"));
            // A redirect's own length is that of its body.
            let redirected = headers.contains_key("location") && !headers.contains_key("x-linked-size");
            file.size = length.filter(|_| !redirected).and_then(|length| length.parse().ok());
            file.sha256 = file.sha256.take().or_else(|| etag_sha256(&headers));
        }
        Ok(files)
    }

    /// Opens a file from `offset` on. The answer may begin at 0 all the same: see its status.
    pub async fn open(&self, repo: &Repo, commit: &str, file: &RemoteFile, offset: u64) -> Result<Response, Refusal> {
        let request = self.authorised(self.http.get(self.file_url(repo, commit, &file.path)));
        let request = if offset > 0 { request.header(RANGE, format!("bytes={offset}-")) } else { request };
        self.send(repo, request).await
    }

    fn file_url(&self, repo: &Repo, commit: &str, path: &str) -> String {
        let (commit, path) = (encode(commit, SEGMENT), encode(path, PATH));
        format!("{}/{}/{}/resolve/{commit}/{path}", self.endpoint, repo.org, repo.name)
    }

    fn authorised(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        // reqwest drops the header on a redirect to another host, so storage never sees the token.
        match &self.token {
            Some(token) => request.bearer_auth(token.expose()),
            None => request,
        }
    }

    async fn send(&self, repo: &Repo, request: reqwest::RequestBuilder) -> Result<Response, Refusal> {
        let response = request.send().await.map_err(|error| {
            let cause = root_cause(&error);
            match error.is_builder() || error.is_redirect() {
                true => Refusal::Final(failed(format!("{}: {cause}", self.endpoint))),
                false => Refusal::Passing(format!("cannot reach {}: {cause}", self.endpoint), None),
            }
        })?;
        let status = response.status();
        if status.is_success() || status.is_redirection() {
            return Ok(response);
        }
        let passing = status.is_server_error() || matches!(status.as_u16(), 408 | 425 | 429);
        if passing {
            let wait = response.headers().get("retry-after").and_then(|wait| wait.to_str().ok()?.parse().ok());
            let message = format!("{} answered {}", self.endpoint, status);
            return Err(Refusal::Passing(message, wait.map(Duration::from_secs)));
        }
        if status == StatusCode::RANGE_NOT_SATISFIABLE {
            return Err(Refusal::PastEnd);
        }
        Err(Refusal::Final(self.refused(repo, status, response.headers())))
    }

    fn refused(&self, repo: &Repo, status: StatusCode, headers: &HeaderMap) -> Error {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let page = format!("{}/{}/{}", self.endpoint, repo.org, repo.name);
        let gated = text("x-error-code") == "GatedRepo";
        let (kind, message) = match (status.as_u16(), text("x-error-code")) {
            (_, "RepoNotFound") | (404, "") => (
                Kind::NotFound,
                format!("there is no {repo} on {}: check the spelling; a private one needs --token", self.endpoint),
            ),
            (_, "RevisionNotFound") => {
                (Kind::NotFound, format!("{repo} has no such revision: {page} lists its branches and tags"))
            }
            (404, _) => (Kind::NotFound, format!("{repo}: the file is listed but not there: try another revision")),
            (401 | 403, _) if gated && self.token.is_none() => (
                Kind::Unauthorized,
                format!("{repo} is gated: accept its terms at {page}, then give your token with --token or HF_TOKEN"),
            ),
            (401 | 403, _) if gated => (
                Kind::Forbidden,
                format!("{repo} is gated and this token's account may not read it yet: ask for access at {page}"),
            ),
            (401 | 403, _) if self.token.is_none() => (
                Kind::Unauthorized,
                format!("{repo} is private, gated or not there: give a token with --token or HF_TOKEN if you have one"),
            ),
            (401 | 403, _) => {
                (Kind::Forbidden, format!("the token may not read {repo}: is it valid, and has its account access?"))
            }
            _ => (Kind::NotFound, format!("{} answered {status}: {}", self.endpoint, text("x-error-message"))),
        };
        Error::new(kind, message)
    }
}

/// Tries small requests a few times; downloads have their own way, since they can make progress.
async fn retrying<T>(attempt: impl AsyncFn() -> Result<T, Refusal>) -> Result<T> {
    let mut tries = 0;
    loop {
        match attempt().await {
            Ok(value) => return Ok(value),
            Err(Refusal::Final(error)) => return Err(error),
            Err(Refusal::PastEnd) => return Err(failed("the hub refused a range nobody asked for")),
            Err(Refusal::Passing(message, _)) if tries >= 3 => {
                return Err(Error::new(Kind::ModelUnavailable, format!("{message} (tried {} times)", tries + 1)));
            }
            Err(Refusal::Passing(_, wait)) => tokio::time::sleep(backoff(tries, wait)).await,
        }
        tries += 1;
    }
}

/// Half a second, doubled each time up to half a minute; a server's own wish counts up to two minutes.
pub fn backoff(failures: u32, wished: Option<Duration>) -> Duration {
    let own = Duration::from_millis(500 << failures.min(6)).min(Duration::from_secs(30));
    wished.map_or(own, |wish| wish.clamp(own, Duration::from_secs(120)))
}

fn etag_sha256(headers: &HeaderMap) -> Option<String> {
    let etag = headers.get("x-linked-etag").or_else(|| headers.get(ETAG))?.to_str().ok()?;
    sha256_hex(etag.trim_start_matches("W/").trim_matches('"'))
}

/// A git blob's hash has 40 digits and is no SHA-256 of the content.
fn sha256_hex(text: &str) -> Option<String> {
    let hash = text.strip_prefix("sha256:").unwrap_or(text);
    (hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit())).then(|| hash.to_ascii_lowercase())
}

fn stays_inside(path: &str) -> bool {
    let good = |part: &str| !matches!(part, "" | "." | "..") && !part.contains(['\\', '\0']);
    path.split('/').all(good)
}

const PATH: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'_').remove(b'.').remove(b'~');
const SEGMENT: &AsciiSet = &PATH.add(b'/');

fn encode(text: &str, set: &'static AsciiSet) -> String {
    utf8_percent_encode(text, set).to_string()
}

impl FromStr for Repo {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (path, revision) = text.split_once('@').unwrap_or((text, "main"));
        let good = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        };
        let revision_is_good = !revision.is_empty() && revision.split('/').all(good);
        match path.split_once('/') {
            Some((org, name)) if good(org) && good(name) && revision_is_good => {
                Ok(Self { org: org.into(), name: name.into(), revision: revision.into() })
            }
            _ => Err("expected ORG/MODEL or ORG/MODEL@REVISION, such as HuggingFaceTB/SmolLM2-135M-Instruct".into()),
        }
    }
}

impl fmt::Display for Repo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.org, self.name)?;
        if self.revision == "main" { Ok(()) } else { write!(f, "@{}", self.revision) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_grows_and_ends() {
        assert_eq!(backoff(0, None), Duration::from_millis(500));
        assert_eq!(backoff(3, None), Duration::from_secs(4));
        assert_eq!(backoff(60, None), Duration::from_secs(30));
        assert_eq!(backoff(0, Some(Duration::from_secs(5))), Duration::from_secs(5));
        assert_eq!(backoff(0, Some(Duration::from_secs(5000))), Duration::from_secs(120));
    }

    #[test]
    fn only_real_content_hashes_are_believed() {
        let hash = "B".repeat(64);
        assert_eq!(sha256_hex(&hash), Some("b".repeat(64)));
        assert_eq!(sha256_hex(&format!("sha256:{hash}")), Some("b".repeat(64)));
        assert_eq!(sha256_hex(&"b".repeat(40)), None);
        assert_eq!(sha256_hex(&"g".repeat(64)), None);
    }

    #[test]
    fn listed_paths_stay_inside_the_models_folder() {
        for (path, good) in [
            ("a", true),
            ("a/b.c", true),
            ("../a", false),
            ("/a", false),
            ("a//b", false),
            ("a\\b", false),
            ("", false),
        ] {
            assert_eq!(stays_inside(path), good, "{path}");
        }
    }

    #[test]
    fn odd_names_are_encoded_in_urls() {
        assert_eq!(encode("refs/pr/1", SEGMENT), "refs%2Fpr%2F1");
        assert_eq!(encode("a b/c#d?.gguf", PATH), "a%20b/c%23d%3F.gguf");
    }

    #[test]
    fn repositories_are_named_as_on_the_hub_and_never_lead_out_of_the_folder() {
        let repo: Repo = "HuggingFaceTB/SmolLM2-135M-Instruct@v1.0".parse().expect("good");
        assert_eq!((repo.org.as_str(), repo.revision.as_str()), ("HuggingFaceTB", "v1.0"));
        assert_eq!("o/m".parse::<Repo>().expect("good").revision, "main");
        assert_eq!("o/m@refs/pr/1".parse::<Repo>().expect("good").revision, "refs/pr/1");
        for bad in ["model", "o/", "/m", "../m", "o/..", "o/m/x", "o/m@", "o m/x", "o/m@../x"] {
            assert!(bad.parse::<Repo>().is_err(), "{bad}");
        }
    }
}
