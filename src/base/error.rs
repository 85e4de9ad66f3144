//! One error type for the whole request path: a kind for the machine, a message for the caller, a source for the log.

use std::fmt;
use std::time::Duration;

/// `std::result::Result` with our error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, as a client or a retry loop needs to know it. Each HTTP surface maps a kind to a status and code.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Kind {
    /// The request is malformed or a value is out of range; `param` names the field.
    BadInput,
    /// A fine-tune lacks one of its files.
    Incomplete,
    /// The body is larger than the configured limit.
    TooLarge,
    /// Prompt plus requested output do not fit the model's context window.
    ContextLength,
    /// No such model in the catalog, or not one that does this task.
    NoSuchModel,
    /// No such route.
    NotFound,
    /// The route exists, the method does not.
    MethodNotAllowed,
    /// The model or this build cannot do what was asked (tools, LoRA, images …).
    Unsupported,
    /// Missing or wrong credentials.
    Unauthorized,
    /// Known caller, not allowed here.
    Forbidden,
    /// Too many requests for a rule; see `retry_after`.
    RateLimited,
    /// The account's allocation of neurons is used up; a retry before the reset cannot help.
    OutOfNeurons,
    /// A budget of the caller's is used up, or does not reach for this call.
    OverBudget,
    /// What calls cost cannot be written down at the moment.
    LedgerDown,
    /// The queue in front of the engine is full; worth a retry in a moment.
    Busy,
    /// The model is known but not loaded, is loading, or its device is down.
    ModelUnavailable,
    /// The deadline passed.
    Timeout,
    /// The caller went away or the operator stopped the call.
    Aborted,
    /// The device thread died under this request.
    EngineLost,
    /// The daemon is draining.
    ShuttingDown,
    /// No such gateway.
    NoSuchGateway,
    /// No such provider, or it cannot do this.
    NoSuchProvider,
    /// No key is stored under the alias that was named.
    NoStoredKey,
    /// An upstream could not be reached, or broke off before it answered.
    Unreachable,
    /// An upstream did not begin to answer in time.
    UpstreamTimeout,
    /// A rule of the gateway lets the request not through.
    PromptBlocked,
    /// A rule of the gateway lets the answer not through.
    AnswerBlocked,
    /// A bug or a broken machine; details go to the log only.
    Internal,
}

impl Kind {
    /// Its HTTP status, on every surface that has no other of its own.
    pub const fn status(self) -> u16 {
        match self {
            Self::Unauthorized => 401,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::Timeout | Self::Aborted => 408,
            Self::TooLarge => 413,
            Self::PromptBlocked | Self::AnswerBlocked => 424,
            Self::RateLimited | Self::OutOfNeurons | Self::OverBudget | Self::Busy => 429,
            Self::Internal => 500,
            Self::Unreachable => 502,
            Self::ModelUnavailable | Self::EngineLost | Self::ShuttingDown | Self::LedgerDown => 503,
            Self::UpstreamTimeout => 504,
            Self::BadInput
            | Self::Incomplete
            | Self::ContextLength
            | Self::NoSuchModel
            | Self::Unsupported
            | Self::NoSuchGateway
            | Self::NoSuchProvider
            | Self::NoStoredKey => 400,
        }
    }

    /// For metric labels and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::BadInput => "bad_input",
            Self::Incomplete => "incomplete",
            Self::TooLarge => "too_large",
            Self::ContextLength => "context_length",
            Self::NoSuchModel => "no_such_model",
            Self::NotFound => "not_found",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::Unsupported => "unsupported",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::RateLimited => "rate_limited",
            Self::OutOfNeurons => "out_of_neurons",
            Self::OverBudget => "over_budget",
            Self::LedgerDown => "ledger_down",
            Self::Busy => "busy",
            Self::ModelUnavailable => "model_unavailable",
            Self::Timeout => "timeout",
            Self::Aborted => "aborted",
            Self::EngineLost => "engine_lost",
            Self::ShuttingDown => "shutting_down",
            Self::NoSuchGateway => "no_such_gateway",
            Self::NoSuchProvider => "no_such_provider",
            Self::NoStoredKey => "no_stored_key",
            Self::Unreachable => "unreachable",
            Self::UpstreamTimeout => "upstream_timeout",
            Self::PromptBlocked => "prompt_blocked",
            Self::AnswerBlocked => "answer_blocked",
            Self::Internal => "internal",
        }
    }
}

/// The limit that stopped a call, as its headers say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// Of how many.
    pub limit: u64,
    /// How many are left.
    pub left: u64,
    /// Until there are more.
    pub reset: Duration,
}

/// An error on its way to a caller. Cloneable, since several waiters may have to hear the same one.
#[derive(Clone)]
pub struct Error {
    kind: Kind,
    message: String,
    param: Option<String>,
    retry_after: Option<Duration>,
    attempts: Option<Box<str>>,
    limit: Option<Box<Limit>>,
    source: Option<std::sync::Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind`; the message says what to do about it.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { kind, message, param: None, retry_after: None, attempts: None, limit: None, source: None }
    }

    /// Shorthand for [`Kind::BadInput`].
    pub fn bad_input(message: impl Into<String>) -> Self {
        Self::new(Kind::BadInput, message)
    }

    /// [`Kind::BadInput`] about one field, named as the client wrote it (`messages.0.content`).
    pub fn bad_field(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(Kind::BadInput, message) }
    }

    /// Shorthand for [`Kind::Unsupported`].
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(Kind::Unsupported, message)
    }

    /// Shorthand for [`Kind::Internal`].
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Kind::Internal, message)
    }

    /// Names the field at fault.
    pub fn with_param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Says when a retry makes sense.
    pub fn with_retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// Says what was tried before it was given up, unless that is said already.
    pub fn with_attempts(mut self, attempts: &str) -> Self {
        if !attempts.is_empty() {
            self.attempts.get_or_insert_with(|| attempts.into());
        }
        self
    }

    /// Says which limit it was.
    pub fn with_limit(mut self, limit: Limit) -> Self {
        self.limit = Some(Box::new(limit));
        self
    }

    /// Keeps the cause for the log.
    pub fn with_source(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(std::sync::Arc::new(source));
        self
    }

    /// Puts words in front of the message, as an error climbs out of a file or a model.
    pub fn context(mut self, words: impl fmt::Display) -> Self {
        self.message = format!("{words}: {}", self.message);
        self
    }

    /// What went wrong.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The sentence for the caller.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The field at fault, if one is.
    pub fn param(&self) -> Option<&str> {
        self.param.as_deref()
    }

    /// What was tried before it was given up.
    pub fn attempts(&self) -> Option<&str> {
        self.attempts.as_deref()
    }

    /// The limit that stopped it.
    pub fn limit(&self) -> Option<Limit> {
        self.limit.as_deref().copied()
    }

    /// How long to wait before a retry, if a retry helps.
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.message)?;
        if let Some(source) = &self.source {
            write!(f, " (caused by {source})")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source.as_ref() as &(dyn std::error::Error + 'static))
    }
}
