//! What `env.AI.run` in Worker code turns into: `POST /run?version=3` with the model in a header, answered bare. Runs on a
//! listener of its own, without credentials, for one configured account.

use actix_web::HttpResponse;

use crate::base::{Error, Result};
use crate::http::ask::Ask;
use crate::http::{Services, run, text};

/// Runs the model named in `cf-consn-model-id` on `inputs`.
pub(super) async fn serve(services: &Services, ask: &Ask) -> Result<HttpResponse> {
    if let Some(version) = ask.query.get("version").filter(|version| !matches!(version.as_str(), "2" | "3")) {
        let version: String = version.chars().take(16).collect();
        return Err(Error::bad_field(
            "version",
            format!("version `{version}` of the binding is not known: 2 and 3 are"),
        ));
    }
    if ask.query.contains_key("userInputs") {
        return Err(
            Error::unsupported("Inputs that are streams are not available in this build.").with_param("userInputs")
        );
    }
    let fields = ask.fields()?;
    let Some(inputs) = fields.object("inputs")? else { return Err(fields.missing("inputs")) };
    let mut queue = false;
    if let Some(options) = fields.object("options")? {
        queue = options.bool("queueRequest")?.unwrap_or(false);
        options.refuse("websocket", "WebSockets are not available in this build.")?;
        options.refuse("gateway", "AI Gateway is not available in this build: leave out `options.gateway`.")?;
    }
    let Some(header) = ask.model_header.as_deref() else {
        return Err(Error::bad_field(
            "cf-consn-model-id",
            "the header `cf-consn-model-id` is required: it names the model",
        ));
    };
    // `<prefix>:<model>` where the caller set options.prefix; no model id of ours has a colon before its name.
    let known = services.config.get().catalog.resolve(header).is_some();
    let model = if known { header } else { header.split_once(':').map_or(header, |(_, model)| model) };
    run::infer(services, ask, model, &inputs, text::reject_if_busy(&fields)?, queue).await
}
