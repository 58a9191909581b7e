def to_tensor(picture: object) -> object:
    raise NotImplementedError("torchvision is a stub here")
