//! The actor that owns list and memory, and the handle callers hold.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use tokio::sync::Semaphore;
use tracing::{info, warn};

use crate::adapters::book::{Book, Draft, Finetune};
use crate::adapters::cache::{Cache, Cell, Key};
use crate::adapters::disk::{Disk, unreadable};
use crate::adapters::upload::Upload;
use crate::base::{AccountId, Error, Kind, Millis, ModelId, Result};
use crate::config::Live;
use crate::metrics::Metrics;
use crate::model::lora::{Adapter, Shape, WEIGHTS_FILE};

/// Messages waiting at most; callers wait in line behind it.
const MAILBOX: usize = 1024;
/// Files that come in at the same time; more are told to come back.
const UPLOADS: usize = 8;
/// Adapters opened at the same time: each takes a core from decoding.
const OPENS: usize = 2;

/// The adapters' whole outside.
#[derive(Clone)]
pub struct Adapters {
    addr: Addr<AdaptersActor>,
    config: Live,
    metrics: Arc<Metrics>,
    uploads: Arc<Semaphore>,
    opens: Arc<Semaphore>,
}

impl Adapters {
    /// Reads what is on disk and starts the actor on a thread of its own.
    pub fn start(config: Live, metrics: Arc<Metrics>) -> Self {
        let disk = config.get().lora.path.clone().map(Disk::new);
        let book = disk.as_ref().map(|disk| Book::of(disk.read())).unwrap_or_default();
        let (live, series) = (config.clone(), metrics.clone());
        let addr = AdaptersActor::start_in_arbiter(&Arbiter::new().handle(), move |ctx| {
            ctx.set_mailbox_capacity(MAILBOX);
            AdaptersActor { config: live, disk, book, cache: Cache::default(), metrics: series }
        });
        let [uploads, opens] = [UPLOADS, OPENS].map(|permits| Arc::new(Semaphore::new(permits)));
        Self { addr, config, metrics, uploads, opens }
    }

    /// Makes an adapter known; its files follow.
    ///
    /// # Errors
    /// `BadInput` when the name is taken or no name, or the account has too many; `Unsupported` when there is no place for
    /// adapters.
    pub async fn create(&self, account: &AccountId, draft: Draft) -> Result<Finetune> {
        self.addr.send(Create(account.clone(), draft)).await.map_err(dead)?
    }

    /// An account's adapters, oldest first.
    ///
    /// # Errors
    /// When the actor has died.
    pub async fn list(&self, account: &AccountId) -> Result<Vec<Finetune>> {
        self.addr.send(List(account.clone())).await.map_err(dead)
    }

    /// Begins to take in a file of an adapter, named by id or name.
    ///
    /// # Errors
    /// `NotFound`, and `Busy` while too many files come in.
    pub async fn upload(&self, account: &AccountId, key: &str) -> Result<Upload> {
        let turn = self.uploads.clone().try_acquire_owned().map_err(|_| {
            Error::new(Kind::Busy, "Too many files are coming in; try again in a moment.")
                .with_retry_after(Duration::from_secs(5))
        })?;
        let (finetune, folder) = self.addr.send(Find(account.clone(), key.to_owned())).await.map_err(dead)??;
        let most = self.config.get().lora.max_file_bytes;
        Upload::begin(finetune, &folder, most, turn).await
    }

    /// All bytes of a file are here: it is `name` from now on, in place of what was there.
    ///
    /// # Errors
    /// `BadInput` when a fine-tune has no file of that name, or this is none; then nothing has changed.
    pub async fn keep(&self, mut upload: Upload, name: &str) -> Result<Finetune> {
        let file = upload.finish(name).await?;
        let (finetune, temporary) = (upload.finetune.clone(), upload.path.clone());
        self.addr.send(Place { finetune, temporary, file }).await.map_err(dead)?
    }

    /// Removes an adapter, named by id or name. Requests that compute with it end well.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn delete(&self, account: &AccountId, key: &str) -> Result<Finetune> {
        self.addr.send(Delete(account.clone(), key.to_owned())).await.map_err(dead)?
    }

    /// The adapter that a request of `account` names by id or name, in memory, for a base of this shape.
    ///
    /// # Errors
    /// `BadInput` when it is unknown, for another model or does not fit, `Incomplete` when files are missing, `Busy` when the
    /// memory for adapters is in use.
    pub async fn acquire(&self, account: &AccountId, key: &str, model: &ModelId, shape: Shape) -> Result<Arc<Adapter>> {
        let acquire = Acquire { account: account.clone(), key: key.to_owned(), model: model.clone(), shape };
        let Held { cell, key, folder } = self.addr.send(acquire).await.map_err(dead)??;
        cell.get_or_init(|| self.open(key, folder)).await.clone()
    }

    async fn open(&self, key: Key, folder: PathBuf) -> Result<Arc<Adapter>> {
        // The semaphore is never closed; without a turn it would only be slower.
        let _turn = self.opens.acquire().await;
        let shown = folder.display().to_string();
        let opened = tokio::task::spawn_blocking(move || Adapter::open(&folder, key.shape)).await;
        let opened =
            opened.unwrap_or_else(|error| Err(Error::internal("opening an adapter panicked").with_source(error)));
        let opened = opened.map(Arc::new).map_err(|error| unreadable(error).with_param("lora"));
        let outcome = match &opened {
            Ok(adapter) => {
                info!(folder = shown, rank = adapter.rank(), bytes = adapter.bytes(), "adapter opened");
                "done"
            }
            Err(error) => {
                warn!(folder = shown, %error, "adapter not opened");
                "failed"
            }
        };
        self.metrics.adapter_loads.with_label_values(&[outcome]).inc();
        let bytes = opened.as_ref().ok().map(|adapter| adapter.bytes() as u64);
        self.addr.send(Opened { key, bytes }).await.map_err(dead)?;
        opened
    }
}

fn dead(error: MailboxError) -> Error {
    Error::internal("The keeper of adapters is not answering.").with_source(error)
}

struct AdaptersActor {
    config: Live,
    /// `None`: there is no place for adapters.
    disk: Option<Disk>,
    book: Book,
    cache: Cache,
    metrics: Arc<Metrics>,
}

impl AdaptersActor {
    fn disk(&self) -> Result<&Disk> {
        let off =
            || Error::unsupported("Fine-tunes have no place on this server: its operator has to set `lora.path`.");
        self.disk.as_ref().ok_or_else(off)
    }

    fn show(&self, evicted: usize) {
        let (adapters, bytes) = self.cache.size();
        self.metrics.adapters.set(adapters as i64);
        self.metrics.adapter_bytes.set(bytes as i64);
        self.metrics.adapter_evictions.inc_by(evicted as u64);
    }
}

impl Actor for AdaptersActor {
    type Context = Context<Self>;
}

#[derive(Message)]
#[rtype(result = "Result<Finetune>")]
struct Create(AccountId, Draft);

#[derive(Message)]
#[rtype(result = "Vec<Finetune>")]
struct List(AccountId);

#[derive(Message)]
#[rtype(result = "Result<(Finetune, PathBuf)>")]
struct Find(AccountId, String);

#[derive(Message)]
#[rtype(result = "Result<Finetune>")]
struct Place {
    finetune: Finetune,
    temporary: PathBuf,
    file: &'static str,
}

#[derive(Message)]
#[rtype(result = "Result<Finetune>")]
struct Delete(AccountId, String);

#[derive(Message)]
#[rtype(result = "Result<Held>")]
struct Acquire {
    account: AccountId,
    key: String,
    model: ModelId,
    shape: Shape,
}

/// Where an adapter is, or has to be put.
struct Held {
    cell: Cell,
    key: Key,
    folder: PathBuf,
}

/// From whoever filled a cell.
#[derive(Message)]
#[rtype(result = "()")]
struct Opened {
    key: Key,
    bytes: Option<u64>,
}

impl Handler<Create> for AdaptersActor {
    type Result = Result<Finetune>;

    fn handle(&mut self, Create(account, draft): Create, _: &mut Context<Self>) -> Result<Finetune> {
        let disk = self.disk()?;
        let finetune = self.book.draft(&account, draft, self.config.get().lora.max_adapters, Millis::now())?;
        disk.create(&finetune)?;
        self.book.insert(finetune.clone());
        Ok(finetune)
    }
}

impl Handler<List> for AdaptersActor {
    type Result = Vec<Finetune>;

    fn handle(&mut self, List(account): List, _: &mut Context<Self>) -> Vec<Finetune> {
        self.book.list(&account).to_vec()
    }
}

impl Handler<Find> for AdaptersActor {
    type Result = Result<(Finetune, PathBuf)>;

    fn handle(&mut self, Find(account, key): Find, _: &mut Context<Self>) -> Self::Result {
        let disk = self.disk()?;
        let finetune = self.book.find(&account, &key)?.clone();
        let folder = disk.folder(&finetune);
        Ok((finetune, folder))
    }
}

impl Handler<Place> for AdaptersActor {
    type Result = Result<Finetune>;

    fn handle(&mut self, place: Place, _: &mut Context<Self>) -> Result<Finetune> {
        let Place { finetune, temporary, file } = place;
        // It may have been deleted while the file came in.
        let id = self.book.find(&finetune.account, &finetune.id.to_string())?.id;
        self.disk()?.take_in(&finetune, &temporary, file)?;
        let taken = self.book.taken_in(&finetune.account, id, file, Millis::now()).cloned();
        taken.ok_or_else(|| Error::internal("a fine-tune went away under its file"))
    }
}

impl Handler<Delete> for AdaptersActor {
    type Result = Result<Finetune>;

    fn handle(&mut self, Delete(account, key): Delete, _: &mut Context<Self>) -> Result<Finetune> {
        let finetune = self.book.find(&account, &key)?.clone();
        self.disk()?.remove(&finetune)?;
        self.book.remove(&account, finetune.id);
        let evicted = self.cache.forget(finetune.id);
        self.show(evicted);
        Ok(finetune)
    }
}

impl Handler<Acquire> for AdaptersActor {
    type Result = Result<Held>;

    fn handle(&mut self, Acquire { account, key, model, shape }: Acquire, _: &mut Context<Self>) -> Result<Held> {
        let disk = self.disk().map_err(|error| error.with_param("lora"))?;
        let lora = &self.config.get().lora;
        let finetune = self.book.usable(&account, lora.public_account.as_ref(), &key, &model)?;
        let folder = disk.folder(finetune);
        let key = Key { id: finetune.id, version: finetune.version, shape };
        // Narrow halves are padded: at most twice what the file has, until it is known.
        let length = std::fs::metadata(folder.join(WEIGHTS_FILE)).map_or(0, |file| file.len());
        let (cell, evicted) = self.cache.acquire(key, 2 * length, lora.cache_bytes)?;
        self.show(evicted);
        Ok(Held { cell, key, folder })
    }
}

impl Handler<Opened> for AdaptersActor {
    type Result = ();

    fn handle(&mut self, Opened { key, bytes }: Opened, _: &mut Context<Self>) {
        let evicted = self.cache.opened(key, bytes, self.config.get().lora.cache_bytes);
        self.show(evicted);
    }
}
