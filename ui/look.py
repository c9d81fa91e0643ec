"""How the page looks: one accent, system fonts (nothing is fetched), light and dark."""

from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"

_SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
_MONO = ("ui-monospace", "SF Mono", "Cascadia Mono", "DejaVu Sans Mono", "monospace")


def theme() -> Any:
    """The gradio theme; `assets/page.css` does the rest."""
    import gradio as gr

    return gr.themes.Base(
        primary_hue=gr.themes.colors.orange,
        neutral_hue=gr.themes.colors.stone,
        font=_SANS,
        font_mono=_MONO,
        radius_size=gr.themes.sizes.radius_md,
    ).set(
        body_background_fill="#faf9f7",
        body_background_fill_dark="#171513",
        body_text_color="#26221e",
        body_text_color_dark="#ece7e1",
        body_text_color_subdued="#6b6259",
        body_text_color_subdued_dark="#a89f94",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#1f1c19",
        background_fill_secondary="#f4f2ee",
        background_fill_secondary_dark="#282420",
        border_color_primary="#e3ded6",
        border_color_primary_dark="#3a342e",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_shadow="none",
        block_label_text_size="*text_sm",
        block_title_text_size="*text_sm",
        block_title_text_weight="600",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_padding="0px",
        layout_gap="14px",
        input_background_fill="#ffffff",
        input_background_fill_dark="#282420",
        input_border_color="#d6cfc5",
        input_border_color_dark="#4a433b",
        input_border_color_focus="#c2410c",
        input_border_color_focus_dark="#fb923c",
        input_border_width="1px",
        input_padding="8px 10px",
        button_primary_background_fill="#c2410c",
        button_primary_background_fill_hover="#9a3412",
        button_primary_background_fill_dark="#c2410c",
        button_primary_background_fill_hover_dark="#ea580c",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        button_secondary_background_fill="#efebe5",
        button_secondary_background_fill_hover="#e3ded6",
        button_secondary_background_fill_dark="#332e29",
        button_secondary_background_fill_hover_dark="#423b34",
        button_large_padding="10px 18px",
        button_large_text_size="*text_md",
        button_large_text_weight="600",
        slider_color="#c2410c",
        slider_color_dark="#fb923c",
        color_accent="#c2410c",
        color_accent_soft="#fdeee4",
        color_accent_soft_dark="#3d2517",
        link_text_color="#9a3412",
        link_text_color_dark="#fdba74",
    )


def head() -> str:
    """What goes into the page's head: the script, inline, and the colour of a phone's frame."""
    script = (ASSETS / "page.js").read_text(encoding="utf-8")
    return f'<meta name="color-scheme" content="light dark"><script>{script}</script>'


HEADER = """
<header class="top">
  <h1>cmlora</h1>
  <p>several LoRAs in one picture</p>
  <button type="button" data-act="theme" aria-label="Dark theme" aria-pressed="false">
    <svg viewBox="0 0 20 20" width="18" height="18" aria-hidden="true">
      <circle cx="10" cy="10" r="7" fill="none" stroke="currentColor" stroke-width="1.6"/>
      <path d="M10 3a7 7 0 0 1 0 14z" fill="currentColor"/>
    </svg>
  </button>
</header>
"""
