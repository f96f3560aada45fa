"use strict";
(() => {
  // Without a pointer the tools would stand over the legend all the time.
  const tools = window.matchMedia("(hover: hover) and (min-width: 560px)");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  // "@name" stands for a color of the page's style, "@scale" for its scale of two colors.
  const dressed = (value) => {
    if (typeof value === "string" && value.startsWith("@")) {
      return value === "@scale" ? [[0, color("scale0")], [1, color("scale1")]] : color(value.slice(1));
    }
    if (Array.isArray(value)) return value.map(dressed);
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, dressed(each)]));
    }
    return value;
  };
  const draw = () => {
    for (const place of document.querySelectorAll(".chart")) {
      const figure = JSON.parse(document.getElementById("figure-" + place.dataset.figure).textContent);
      const layout = dressed(figure.layout);
      layout.font = { color: color("text"), family: getComputedStyle(document.body).fontFamily, size: 12 };
      layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
      layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: color("soft"), activecolor: color("after") };
      layout.margin = layout.margin || { t: 40, l: 60, r: 20, b: 50 };
      layout.hoverlabel = { bgcolor: color("panel"), bordercolor: color("line"), font: { color: color("text") }, align: "left" };
      for (const key of Object.keys(layout).filter((each) => /^[xy]axis\d*$/.test(each))) {
        Object.assign(layout[key], { gridcolor: color("line"), zerolinecolor: color("line"), linecolor: color("line") });
      }
      Plotly.react(place, dressed(figure.data), layout, { responsive: true, displaylogo: false, displayModeBar: tools.matches ? "hover" : false });
    }
  };
  draw();
  dark.addEventListener("change", draw);
})();
