//! `vpsctl image`.

use std::time::SystemTime;

use drover_proto::v1::{
    DeleteImageRequest, GetImageRequest, ListImagesRequest,
    image_service_client::ImageServiceClient,
};

use super::{Context, all_pages, call, import, request_id};
use crate::{
    args::ImageCommand,
    error::Error,
    out::{human::short, json, pages},
};

pub(super) async fn run(context: &Context, command: ImageCommand) -> Result<(), Error> {
    match command {
        ImageCommand::Import(args) => import::run(context, *args).await,
        ImageCommand::List => {
            let request = ListImagesRequest::default();
            let images = all_pages!(context, ImageServiceClient::list_images, request, images);
            context.answer(|| json::array(&images), || pages::images(&images, SystemTime::now()))
        }
        ImageCommand::Show(name) => {
            let request = GetImageRequest { name: name.image };
            let image = call!(context, ImageServiceClient::get_image, request)?;
            context.answer(|| json::object(&image), || pages::image(&image, SystemTime::now()))
        }
        ImageCommand::Delete(name) => {
            let request = DeleteImageRequest {
                name: name.image.clone(),
                etag: String::new(),
                request_id: request_id(),
            };
            call!(context, ImageServiceClient::delete_image, request)?;
            let sentence = format!("{} is deleted; volumes made of it stay", short(&name.image));
            context.gone(&name.image, &sentence)
        }
    }
}
