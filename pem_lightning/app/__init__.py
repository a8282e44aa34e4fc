"""A local page that segments photographs and short videos: `handlers` does the work, `page` shows it by Gradio."""
