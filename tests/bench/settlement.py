NOTE = ""


async def run(scale):
    return {}


def table(r):
    return [("a",)]
